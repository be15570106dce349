// Package sim holds the deterministic simulator: its tests run the production
// parents against the production sign rules under every fault that a seed draws,
// and judge what came of it. It exports nothing and has no code outside of tests.
package sim
