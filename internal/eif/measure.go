package eif

import (
	"crypto/sha512"
	"encoding/hex"
)

// PCRLen is the length of a register, in bytes.
const PCRLen = sha512.Size384

// PCR is the value of a register.
type PCR [PCRLen]byte

// String is the value in hex, as nitro-cli prints it.
func (p PCR) String() string { return hex.EncodeToString(p[:]) }

// hashAlgorithm is how nitro-cli spells SHA-384: the way in which the Rust hash
// that it uses prints itself.
const hashAlgorithm = "Sha384 { ... }"

// Measurements are the registers that an enclave of an image starts with, in hex
// and in the form of nitro-cli.
type Measurements struct {
	HashAlgorithm string
	PCR0          string // kernel, command line and all ramdisks
	PCR1          string // kernel, command line and the first ramdisk
	PCR2          string // the other ramdisks
	PCR8          string `json:",omitempty"` // the certificate that signed the image, where it is signed
}

// Measure computes the registers. Metadata, default memory and CPUs are in none
// of them. An image whose signature does not verify has no measurements.
func (m Image) Measure() (Measurements, error) {
	if err := m.check(); err != nil {
		return Measurements{}, err
	}
	pcr0, pcr1, pcr2 := m.registers()
	out := Measurements{HashAlgorithm: hashAlgorithm, PCR0: pcr0.String(), PCR1: pcr1.String(), PCR2: pcr2.String()}
	if m.Signature != nil {
		cert, err := VerifySignature(m.Signature, pcr0)
		if err != nil {
			return Measurements{}, err
		}
		out.PCR8 = CertificatePCR(cert).String()
	}
	return out, nil
}

func (m *Image) registers() (pcr0, pcr1, pcr2 PCR) {
	all, boot, app := sha512.New384(), sha512.New384(), sha512.New384()
	for _, b := range [][]byte{m.Kernel, []byte(m.Cmdline)} {
		all.Write(b)
		boot.Write(b)
	}
	for i, r := range m.Ramdisks {
		all.Write(r)
		if i == 0 {
			boot.Write(r)
		} else {
			app.Write(r)
		}
	}
	return extended(all.Sum(nil)), extended(boot.Sum(nil)), extended(app.Sum(nil))
}

// extended is a register that was zero and extended once, with a digest.
func extended(digest []byte) PCR {
	return sha512.Sum384(append(make([]byte, PCRLen), digest...))
}
