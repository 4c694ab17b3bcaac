"""Every unlearning method beyond those of eval.py, one file per family. Importing the package registers them."""

# Tables list the methods in this order.
from methods import controls, fine_tuning, projections, published  # noqa: F401
