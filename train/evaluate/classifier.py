"""How good a classifier is: sums over rows that add up over batches and processes, and the figures they come to."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from train.data.labelled import LabelledBatch, Labels


class ClassifierSums:
    """Counts what a classifier says of rows beside what they are.

    Args:
        labels: what it tells apart.
        device: of the counts.
    """

    def __init__(self, labels: Labels, device: torch.device) -> None:
        self._problem = labels.problem
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, rows, right ones or squared error
        self._said_CL = torch.zeros(3, len(labels.names), dtype=torch.float64, device=device)  # rightly, in all; true

    def add(self, loss: Tensor, logits: Tensor, batch: LabelledBatch) -> None:
        """Counts a batch.

        Args:
            loss: summed over its rows.
            logits: (B, labels).
            batch: whose rows they are.
        """
        rows = batch.is_row
        logits, labels = logits[rows].double(), batch.labels[rows]
        if self._problem == "regression":
            good = ((logits - labels) ** 2).mean(dim=-1).sum()
        else:
            if self._problem == "single_label_classification":
                said, true = (
                    torch.zeros_like(logits).scatter_(1, index[:, None], 1.0) for index in (logits.argmax(-1), labels)
                )
            else:
                said, true = (logits > 0).double(), labels.double()
            good = (said == true).all(dim=-1).sum()
            self._said_CL += torch.stack([(said * true).sum(dim=0), said.sum(dim=0), true.sum(dim=0)])
        self._totals += torch.stack([loss.double(), rows.sum(), good])

    def figures(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Sums over the processes.

        Args:
            reduce: sums a tensor over the processes.

        Returns:
            `eval_loss` per row; and `eval_mse`, or `eval_accuracy` (a row with several labels is right when all are)
            and `eval_macro_f1`, the mean F1 of the labels: of those that are said or true at all, where rows have one.
        """
        flat = reduce(torch.cat([self._totals, self._said_CL.flatten()]))
        loss, rows, good = flat[:3].tolist()
        figures = {"eval_loss": loss / max(1.0, rows)}
        if self._problem == "regression":
            return figures | {"eval_mse": good / max(1.0, rows)}
        both_L, said_L, true_L = flat[3:].view(3, -1)
        f1_L = 2 * both_L / (said_L + true_L).clamp(min=1)
        if self._problem == "single_label_classification":
            f1_L = f1_L[said_L + true_L > 0]
        f1 = f1_L.mean().item()
        return figures | {"eval_accuracy": good / max(1.0, rows), "eval_macro_f1": 0.0 if math.isnan(f1) else f1}
