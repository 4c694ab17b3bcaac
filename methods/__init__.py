"""Every way to forget beyond the published system, a file per family. Importing the package registers them."""

# isort: off
# In this order they stand in the tables.
from mimu.methods import controls as controls
from mimu.methods import fine_tuning as fine_tuning
from mimu.methods import projections as projections
from mimu.methods import published as published
from mimu.methods import erasing as erasing
