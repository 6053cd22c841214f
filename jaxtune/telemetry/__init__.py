"""What a run tells while it runs: metric writers, progress, FLOP accounting, profiler traces."""
