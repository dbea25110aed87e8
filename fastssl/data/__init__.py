"""From files to batches of views: datasets (sources), views (the spec), torch_views, loader."""
