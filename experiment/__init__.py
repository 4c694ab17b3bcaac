"""Everything around the stages of a run: settings, files, processes, the command line."""
