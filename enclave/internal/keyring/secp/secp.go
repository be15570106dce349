// Package secp calls the libsecp256k1 that go-ethereum compiles in, where
// go-ethereum's own wrapper is too slow or too loose for an enclave: it
// multiplies the generator by secret scalars with the library's constant-time
// code and signs in a blinded context, without a copy of the scalar. It
// implements no arithmetic of its own and knows neither messages nor hashes.
package secp

/*
#include <stddef.h>
#include <string.h>

// The public interface of libsecp256k1 that is used here, as its header
// include/secp256k1.h and include/secp256k1_recovery.h declare it. The opaque
// types are arrays of fixed size there too.
typedef struct secp256k1_context_struct secp256k1_context;
typedef struct { unsigned char data[64]; } secp256k1_pubkey;
typedef struct { unsigned char data[64]; } secp256k1_ecdsa_signature;
typedef struct { unsigned char data[65]; } secp256k1_ecdsa_recoverable_signature;
typedef int (*secp256k1_nonce_function)(unsigned char *, const unsigned char *, const unsigned char *,
	const unsigned char *, void *, unsigned int);

#define KH_CONTEXT_NONE    1u // SECP256K1_CONTEXT_NONE
#define KH_EC_UNCOMPRESSED 2u // SECP256K1_EC_UNCOMPRESSED

// Weak, because cgo links each package on its own first, where the library is
// not there yet. In the program the linker finds it in go-ethereum's object; a
// program without it is refused by kh_present before anything else is called.
#define KH_LIB extern __attribute__((weak))
KH_LIB secp256k1_context *secp256k1_context_create(unsigned int);
KH_LIB int secp256k1_context_randomize(secp256k1_context *, const unsigned char *);
KH_LIB int secp256k1_ec_pubkey_create(const secp256k1_context *, secp256k1_pubkey *, const unsigned char *);
KH_LIB int secp256k1_ec_pubkey_parse(const secp256k1_context *, secp256k1_pubkey *, const unsigned char *, size_t);
KH_LIB int secp256k1_ec_pubkey_serialize(const secp256k1_context *, unsigned char *, size_t *,
	const secp256k1_pubkey *, unsigned int);
KH_LIB int secp256k1_ecdsa_sign_recoverable(const secp256k1_context *, secp256k1_ecdsa_recoverable_signature *,
	const unsigned char *, const unsigned char *, secp256k1_nonce_function, const void *);
KH_LIB int secp256k1_ecdsa_recoverable_signature_serialize_compact(const secp256k1_context *, unsigned char *, int *,
	const secp256k1_ecdsa_recoverable_signature *);
KH_LIB int secp256k1_ecdsa_signature_parse_compact(const secp256k1_context *, secp256k1_ecdsa_signature *,
	const unsigned char *);
KH_LIB int secp256k1_ecdsa_verify(const secp256k1_context *, const secp256k1_ecdsa_signature *, const unsigned char *,
	const secp256k1_pubkey *);

static int kh_present(void) {
	return secp256k1_context_create && secp256k1_context_randomize && secp256k1_ec_pubkey_create &&
		secp256k1_ec_pubkey_parse && secp256k1_ec_pubkey_serialize && secp256k1_ecdsa_sign_recoverable &&
		secp256k1_ecdsa_recoverable_signature_serialize_compact && secp256k1_ecdsa_signature_parse_compact &&
		secp256k1_ecdsa_verify;
}

static secp256k1_context *kh_context(const unsigned char *seed) {
	secp256k1_context *ctx = secp256k1_context_create(KH_CONTEXT_NONE);
	if (ctx == NULL || !secp256k1_context_randomize(ctx, seed)) return NULL;
	return ctx;
}

static int kh_derive(const secp256k1_context *ctx, unsigned char *out, const unsigned char *scalar) {
	secp256k1_pubkey pub;
	size_t n = 65;
	return secp256k1_ec_pubkey_create(ctx, &pub, scalar) &&
		secp256k1_ec_pubkey_serialize(ctx, out, &n, &pub, KH_EC_UNCOMPRESSED);
}

// A null nonce function means RFC 6979.
static int kh_sign(const secp256k1_context *ctx, unsigned char *out, const unsigned char *digest,
		const unsigned char *scalar) {
	secp256k1_ecdsa_recoverable_signature sig;
	int recid = 0;
	if (!secp256k1_ecdsa_sign_recoverable(ctx, &sig, digest, scalar, NULL, NULL)) return 0;
	secp256k1_ecdsa_recoverable_signature_serialize_compact(ctx, out, &recid, &sig);
	out[64] = (unsigned char)recid;
	return 1;
}

static int kh_parse(const secp256k1_context *ctx, unsigned char *out, const unsigned char *point) {
	secp256k1_pubkey pub;
	if (!secp256k1_ec_pubkey_parse(ctx, &pub, point, 65)) return 0;
	memcpy(out, pub.data, sizeof pub.data);
	return 1;
}

static int kh_verify(const secp256k1_context *ctx, const unsigned char *pub, const unsigned char *digest,
		const unsigned char *rs) {
	secp256k1_ecdsa_signature sig;
	secp256k1_pubkey key;
	memcpy(key.data, pub, sizeof key.data);
	return secp256k1_ecdsa_signature_parse_compact(ctx, &sig, rs) && secp256k1_ecdsa_verify(ctx, &sig, digest, &key);
}

#cgo noescape kh_context
#cgo nocallback kh_context
#cgo noescape kh_derive
#cgo nocallback kh_derive
#cgo noescape kh_sign
#cgo nocallback kh_sign
#cgo noescape kh_parse
#cgo nocallback kh_parse
#cgo noescape kh_verify
#cgo nocallback kh_verify
*/
import "C"

import (
	"crypto/rand"
	"errors"
	"sync"

	// Linked for the C library inside it.
	_ "github.com/ethereum/go-ethereum/crypto/secp256k1"
)

// Lengths in bytes.
const (
	ScalarLen    = 32
	PublicLen    = 65 // 0x04 || x || y
	DigestLen    = 32
	SignatureLen = 65 // r || s || recovery id 0 to 3
)

// ErrScalar refuses a scalar that is zero or not below the group order.
var ErrScalar = errors.New("secp: scalar out of range")

// ErrPoint refuses bytes that are no uncompressed point of the curve.
var ErrPoint = errors.New("secp: not a point")

// context is made once and never written again, so all goroutines share it. It
// is blinded: the generator's multiplication starts from a random point, which
// takes away what an observer of timing or power could correlate.
//
//nolint:gochecknoglobals // one per program, immutable once made
var context = sync.OnceValue(func() *C.secp256k1_context {
	if C.kh_present() == 0 {
		panic("secp: the program was linked without go-ethereum's libsecp256k1")
	}
	var seed [32]byte
	rand.Read(seed[:]) // never fails: it ends the program instead
	defer clear(seed[:])
	ctx := C.kh_context((*C.uchar)(&seed[0]))
	if ctx == nil {
		panic("secp: libsecp256k1 made no context")
	}
	return ctx
})

// Derive returns the uncompressed public key of scalar, in constant time.
func Derive(scalar *[ScalarLen]byte) (public [PublicLen]byte, err error) {
	if C.kh_derive(context(), (*C.uchar)(&public[0]), (*C.uchar)(&scalar[0])) != 1 {
		return public, ErrScalar
	}
	return public, nil
}

// Sign puts the deterministic (RFC 6979), low-s signature of digest into sig,
// in constant time.
func Sign(sig *[SignatureLen]byte, digest *[DigestLen]byte, scalar *[ScalarLen]byte) error {
	if C.kh_sign(context(), (*C.uchar)(&sig[0]), (*C.uchar)(&digest[0]), (*C.uchar)(&scalar[0])) != 1 {
		return ErrScalar
	}
	return nil
}

// Public is a parsed public key, kept to verify more than one signature.
type Public struct{ in [64]byte } // the library's own form

// Parse reads an uncompressed public key.
func Parse(public *[PublicLen]byte) (*Public, error) {
	var p Public
	if public[0] != 4 || C.kh_parse(context(), (*C.uchar)(&p.in[0]), (*C.uchar)(&public[0])) != 1 {
		return nil, ErrPoint
	}
	return &p, nil
}

// Verify reports whether rs (r || s) signs digest under p. It refuses a high s.
func (p *Public) Verify(digest *[DigestLen]byte, rs *[64]byte) bool {
	return C.kh_verify(context(), (*C.uchar)(&p.in[0]), (*C.uchar)(&digest[0]), (*C.uchar)(&rs[0])) == 1
}
