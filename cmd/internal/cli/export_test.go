package cli

// TestingOnlyProgress is NewProgress under a clock of the test.
var TestingOnlyProgress = newProgress
