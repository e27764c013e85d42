"""The package as a command: that of `latent_reasoning.main`."""

import runpy

runpy.run_module('latent_reasoning.main', run_name='__main__', alter_sys=True)
