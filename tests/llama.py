"""The parts of a Llama, as keys of a config."""

LLAMA = {'model.norm': 'rms', 'model.mlp': 'swiglu', 'model.fused_qkv': False,
         'model.position_embedding': 'rotary', 'model.bias': False}
