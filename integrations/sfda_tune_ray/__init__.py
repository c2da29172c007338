"""sfda_tune on Ray: extraction over actors, and a Tune searcher, schedulers and search spaces."""
