"""How runs are started: model presets, recipes, submission to a cluster, and the demo."""
