"""Positional skip-wise training (PoSE, Zhu et al. 2023, arXiv 2309.10400): long positions, learned in short windows.

A window of n tokens has two chunks. The second one begins at a random later place of the text, and its positions skip a random
number, so that over many windows all distances up to the target context occur:

| | first chunk, l tokens | second chunk, n - l tokens |
|:--|:--|:--|
| place in the text | 0, …, l - 1 | v + l, …, v + n - 1 |
| position | 0, …, l - 1 | u + l, …, u + n - 1 |

l, v and u are uniform and independent: l in [1, (n + 1) / 2] as in the paper's code, v up to the end of the text, u up to the
target context. The paper takes one document as the text; here it is the part of the token stream that a window of the target
context would hold.
"""

import numpy
import torch

from longqlora.data.packing import PackedWindows, held_out_begin


class PoseWindows(PackedWindows):
    """A token stream cut into short windows with long positions. There are as many as without skips, so that one pass over them
    has as many tokens as the stream, but some tokens occur in no window and others in several.

    The end of the data that is held out (:func:`longqlora.data.packing.held_out_tokens`) is not part of it.

    Args:
        path: of the ``.bin`` file.
        length: of a window, in tokens.
        target_context: the positions end below it; also the length of the text that a window is taken from, in tokens.
        seed: of the chunks and skips; every epoch draws others.
    """

    def __init__(self, path: str, length: int, *, target_context: int, seed: int):
        super().__init__(path, length, end=held_out_begin(path, target_context))
        self.target_context, self.seed, self.epoch = target_context, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other chunks and skips; the same ones for the same epoch."""
        self.epoch = epoch

    def draw(self, index: int) -> tuple[int, int, int]:
        """Length of the first chunk of a window, and how many tokens of the text and how many positions are then skipped."""
        begin, end = self.span(index)
        text = min(self.target_context, self.end - begin)
        random = numpy.random.default_rng((self.seed, self.epoch, index))
        highest = [(end - begin + 1) // 2, text - (end - begin), self.target_context - (end - begin)]
        first, skipped_tokens, skipped_positions = random.integers([1, 0, 0], highest, endpoint=True).tolist()
        return first, skipped_tokens, skipped_positions

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin, end = self.span(index)
        first, skipped_tokens, skipped_positions = self.draw(index)
        places, positions = numpy.arange(begin, end), torch.arange(end - begin)
        places[first:] += skipped_tokens
        positions[first:] += skipped_positions
        window = torch.from_numpy(self.tokens[places].astype("int64"))
        # without a mask, transformers would take the chunks for two documents, and the second would not see the first
        return {"input_ids": window, "labels": window, "position_ids": positions, "attention_mask": torch.ones_like(window)}

    def contents(self, index: int) -> str:
        """Tokens of a window's chunks, for a message; counted from 0."""
        (begin, end), (first, skipped, _) = self.span(index), self.draw(index)
        return f"tokens {begin} to {begin + first - 1} and {begin + first + skipped} to {end + skipped - 1} of {self.path}"
