"""What was generated, and how sure of it the draws are."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SequenceUncertainty:
    """Sums over the tokens of each sequence, (N,), in nats."""

    log_probability: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


@dataclass(frozen=True)
class Generation:
    """New tokens and the uncertainty of each; entropies in nats, 0 where there is no token.

    All are (N, T). Under `draws_as="sequences"` they are (S, N, T): every draw has its own text, so
    total and expected entropy are the draw's own, and its mutual information is 0.

    Args:
        sequences: ids of the new tokens; the pad token after a sequence's end.
        mask: which of them belong to the text, the end token included.
        log_probabilities: of the tokens, under the average over draws before temperature, top-p and
            penalties change it.
        total_entropy: of the average over draws of the next token's distribution.
        expected_entropy: mean entropy of the draws' distributions (aleatoric).
        mutual_information: their difference times S/(S − 1) (epistemic), as in `Prediction`.
    """

    sequences: Tensor
    mask: Tensor
    log_probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many tokens each sequence has, (N,)."""
        return self.mask.sum(-1)

    def per_sequence(self) -> SequenceUncertainty:
        """Sums over each sequence's tokens; divide by `lengths` to compare texts of other lengths.

        By the chain rule the entropy of a distribution over texts is the expected sum of those of
        the next tokens, of which a sampled text gives one term.
        """
        return SequenceUncertainty(
            self.log_probabilities.sum(-1),
            self.total_entropy.sum(-1),
            self.expected_entropy.sum(-1),
            self.mutual_information.sum(-1),
        )
