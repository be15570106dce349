package main

// TestingOnlyCommand is the program as it is, for tests that run it as a process.
var TestingOnlyCommand = command
