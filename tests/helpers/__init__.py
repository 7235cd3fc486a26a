"""What several tests share: tiny parents, settings, processes, comparisons."""
