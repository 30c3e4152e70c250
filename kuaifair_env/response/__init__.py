"""What users do with a slate: observed matrices, factor models and history-dependent models, fitted to logs."""
