"""Special tokens and two tokenized problems of a toy vocabulary of 32."""

from latent_reasoning.sequences import SpecialTokens, TokenizedExample

IDS = SpecialTokens(pad=20, end=21, block_open=22, memory=23, block_close=24, pause=25,
                    steps=(26, 27, 28), newline=(10,), answer=(10, 11))
EXAMPLES = [TokenizedExample([1, 2, 3], [[4, 5], [6, 7, 8, 9], [1]], [8]),
            TokenizedExample([3, 1, 2, 9, 4], [[5, 5]], [9, 1])]
