"""What the adapters share: patches, the step's loss, the run and its report. Knows no trainer."""
