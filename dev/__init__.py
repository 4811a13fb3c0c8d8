"""Programs for developers: benchmarks, fuzzing, stress tests, comparisons of trainings."""
