//go:build !cgo

package secp

// Without cgo go-ethereum falls back to a variable-time signer, which leaks
// keys. This build is not to exist, so its one declaration has no meaning.
const _ = keyhold_needs_cgo_because_without_it_go_ethereum_signs_in_variable_time
