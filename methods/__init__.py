"""Every way to forget beyond the published system, a file per family. Importing the package registers them."""

# In this order they stand in the tables.
from methods import controls, fine_tuning, projections, published, erasing  # noqa: F401, I001
