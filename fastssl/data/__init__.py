"""From files to batches of views: sources, views (the spec), render (who makes them), loader."""
