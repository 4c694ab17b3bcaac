"""Every way to forget beyond the published system, a file per family. Importing the package registers them."""

# In this order they stand in the tables.
from methods import controls as controls
from methods import fine_tuning as fine_tuning
from methods import projections as projections
