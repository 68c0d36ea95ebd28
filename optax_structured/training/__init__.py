"""Two jobs that train real networks with any recipe by name; need the extra `train`."""
