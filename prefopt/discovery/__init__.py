"""The search for losses: propose an expression of the margin, check it, score it, keep it in an archive.

An expression is read by a parser of its own and never run as code. What a proposer answers is data.
"""

from prefopt.discovery.loss import ExpressionLoss
from prefopt.discovery.read import ExpressionError, read

__all__ = ["ExpressionError", "ExpressionLoss", "read"]
