// Package hostile holds the attacks that are tried against Keyhold as root on
// the parent could: its tests speak the wire protocol, stand between enclave and
// KMS and write the tables, and judge what came of it. It exports nothing and
// has no code outside of tests.
package hostile
