"""What the engine asks of a model: layer states, one forward over rows, logits of the rows that want them.

A model knows nothing of requests, pages or steps: rows of any requests, in any order, come with their tokens, and
`ctx` gives their positions and the attention operation. Letters: R rows, M output rows, E model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from headrace.layers.adapters import AdapterBank
from headrace.models.config import ModelConfig
from headrace.step import LayerState, StepContext


class CausalLM(nn.Module, ABC):
    """A language model over rows. Parameters carry no gradient; the model is always in inference mode."""

    config: ModelConfig
    max_model_len: int
    """Positions 0 .. max_model_len - 1 can be evaluated; an index outside is an error of the caller."""
    adapters: AdapterBank | None = None
    """Where adapters are loaded; None: the model was built without room for any."""
    parity = False
    """Whether the bits of each row are a function of that row and of what it sees."""
    prefix = ""
    """What all names of tensors but the head's begin with; some checkpoints leave it out."""

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is none of the model's, and rightly there."""
        return False

    @abstractmethod
    def layer_states(self) -> list[LayerState]:
        """What each layer keeps for a request, by the layer index that it passes to `ctx.attend` or `ctx.recur`."""

    @abstractmethod
    def forward(self, tok_R: Tensor, ctx: StepContext, wanted_M: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, in the model's type: [R, E], or [M, E] of the rows `wanted_M` (int64).

        tok_R: int32 or int64 [R]. Calls `ctx.attend` or `ctx.recur` once a layer, in the order of the layers.
        """

    @abstractmethod
    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Logits [M, V] of hidden states, in the model's type or a wider one."""

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every checkpoint tensor by name, and the views of the parameters that it is copied to.

        The embedding comes first. A name's views all have the shape of the checkpoint tensor, unless they are `Pieces`
        of it, as those of divided layers; together the views cover all parameters.
        """

    def finish_loading(self) -> None:
        """What layers make of their parameters, once, when all tensors are in their places: a layer that has a method
        `loaded` is called."""
        for module in self.modules():
            loaded = getattr(module, "loaded", None)
            if loaded is not None:
                loaded()
