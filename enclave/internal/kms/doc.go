// Package kms gets data keys from AWS KMS for an attested enclave. It refuses
// replies that are not from the measured key, that show a plaintext, or that
// are not sealed to a key made for that one request.
package kms
