package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/receipt"
)

// registers that are shown, what they measure, what to do where one is not as
// wanted, and the flag that it was wanted with.
var registers = []struct {
	number int
	text   string
	advice string
	from   string
}{
	{0, "image", "another image runs there: take PCR0 from the build that was meant (keyhold image measure, or describe-eif); where it is not that one, terminate the enclave and run the one that is wanted", ""},
	{1, "kernel and boot", "another kernel or boot ramdisk: the measurements are of another build", ""},
	{2, "application", "another program: the measurements are of another build", ""},
	{3, "IAM role of the instance", "the instance had another role, or none, when it launched the enclave: look at its instance profile, and run the enclave again after a change", "  of --role-arn"},
	{4, "instance", "the enclave is on another instance: --enclave leads elsewhere, or somebody relays", "  of --instance-id"},
	{8, "signing certificate of the image", "the image was signed with another certificate, or not at all", ""},
	{16, "config", "the enclave was given another config: compare with keyhold config show; restart the enclave, and let the parent hand over the one that is wanted", "  of --config"},
}

// check is one thing that was compared.
type check struct {
	Name   string `json:"name"` // form, signature, time, purpose, a register as PCR0, or boot
	OK     bool   `json:"ok"`
	Want   string `json:"want"`   // empty where that has no short form
	Got    string `json:"got"`    // likewise
	Advice string `json:"advice"` // what to do; empty where it is as wanted
}

// shown is what an enclave or a file showed.
type shown struct {
	raw   []byte
	doc   *attestation.Document // nil: it could not even be read. Believed only with refused == nil
	nonce []byte                // nil: a stored document
	at    time.Time             // when it was verified
	proof proof                 // of an enclave
	// refused is why it is not all that is wanted; it decides. What the checks say
	// explains it.
	refused error
}

func (s *shown) live() bool { return s.nonce != nil }

// checks compares part by part, so that a person sees what is not as wanted.
func (s *shown) checks(w *wanted) []check {
	if s.doc == nil {
		return []check{{Name: "form", Advice: "this is no attestation document: check that the file or the address is right"}}
	}
	signature, timely := s.genuine(w.root)
	out := []check{signature}
	if s.live() {
		out = append(out, timely)
	}
	kind := kindOf(s.doc.UserData)
	purpose := check{Name: "purpose", OK: kind != "" && (!s.live() || kind == receipt.KindChallenge), Got: kind}
	if s.live() {
		purpose.Want = receipt.KindChallenge
	}
	if !purpose.OK {
		purpose.Advice = "no Keyhold enclave makes such a document for this: look at what answers there"
	}
	out = append(append(out, purpose), compare(s.doc, closest(s.doc, w.images))...)
	if s.live() && failures(out) == "" { // what else there was to refuse
		boot := check{Name: "boot", OK: s.refused == nil}
		if !boot.OK {
			boot.Advice = "the document is as wanted, but heads, statement or boot id are not of its receipt key or its config: take it for an attack until it is explained"
		}
		out = append(out, boot)
	}
	return out
}

// kindOf names what a Keyhold enclave made a document for; "" where none did.
func kindOf(userData []byte) string {
	for _, kind := range []string{receipt.KindKMS, receipt.KindBoot, receipt.KindChallenge} {
		prefix := receipt.UserData(kind, nil)
		prefix = prefix[:len(prefix)-48] // without the hash
		if len(userData) == len(prefix)+48 && bytes.HasPrefix(userData, prefix) {
			return kind
		}
	}
	return ""
}

// genuine says whether the root signed the document, and whether it is of now,
// apart from what the document says.
func (s *shown) genuine(root attestation.Root) (signature, timely check) {
	signature = check{Name: "signature", OK: true}
	timely = check{Name: "time", OK: true}
	pcr0 := s.doc.PCRs[0]
	if strings.Trim(string(pcr0), "\x00") == "" { // a policy may not want zero
		pcr0 = bytes.Repeat([]byte{1}, len(pcr0))
	}
	self := []attestation.Image{{PCRs: map[int][]byte{0: pcr0}}}
	var err error
	if s.live() {
		_, err = attestation.VerifyLive(s.raw, attestation.LivePolicy{Root: root, Images: self, Nonce: s.nonce, Now: s.at})
	} else {
		_, err = attestation.VerifyRecorded(s.raw, attestation.RecordedPolicy{Root: root, Images: self})
	}
	switch {
	case err == nil:
	case errors.Is(err, attestation.ErrNonce), errors.Is(err, attestation.ErrFuture), errors.Is(err, attestation.ErrStale):
		timely.OK, timely.Advice = false, advice(err)
	case errors.Is(err, attestation.ErrDebug): // signed; its registers say the rest
	default:
		signature.OK, signature.Advice = false, advice(err)
	}
	return signature, timely
}

// advice says what to do about a document that is not genuine or not of now.
func advice(err error) string {
	switch {
	case errors.Is(err, attestation.ErrRoot):
		return "Amazon did not sign it, or with --test-root that root did not: in local mode name the root that keyhold-local up prints; elsewhere what answers is no Nitro enclave"
	case errors.Is(err, attestation.ErrCertificateTime), errors.Is(err, attestation.ErrFuture), errors.Is(err, attestation.ErrStale):
		return "compare this machine's clock with the host's (chronyc tracking); a stored document is verified with --document"
	case errors.Is(err, attestation.ErrNonce):
		return "it is an old document that somebody shows again: keep it (--save) and look at the host"
	}
	return "keep it (--save) and take it for an attack until it is explained"
}

// closest is the wanted image that the document is, or comes nearest to.
func closest(doc *attestation.Document, images []attestation.Image) attestation.Image {
	best, most := attestation.Image{}, -1
	for _, img := range images {
		same := 0
		for i, want := range img.PCRs {
			//nolint:forbidigo // registers are public
			if bytes.Equal(want, doc.PCRs[i]) {
				same++
				if i == 0 {
					same += len(registers) // the image counts more than all else
				}
			}
		}
		if same > most {
			best, most = img, same
		}
	}
	return best
}

// compare holds the document against one wanted image, register by register.
// PCR0 to 2 must not be zero, whatever is wanted.
func compare(doc *attestation.Document, img attestation.Image) []check {
	var out []check
	for _, reg := range registers {
		want, named := img.PCRs[reg.number]
		got := doc.PCRs[reg.number]
		debug := reg.number == 0 && registerText(hex.EncodeToString(got)) == zeroRegister
		if !named && !debug {
			continue
		}
		//nolint:forbidigo // registers are public
		c := check{Name: fmt.Sprintf("PCR%d", reg.number), OK: bytes.Equal(want, got), Want: hex.EncodeToString(want), Got: hex.EncodeToString(got)}
		switch {
		case debug:
			c.OK, c.Advice = false, "the enclave runs in debug mode, in which its console is open and its measurements are zero: run it without --debug-mode; KMS gives it no keys"
		case !c.OK:
			c.Advice = reg.advice
		}
		out = append(out, c)
	}
	return out
}

// failures names the checks that failed, for the error's text.
func failures(checks []check) string {
	var names []string
	for _, c := range checks {
		if !c.OK {
			names = append(names, c.Name)
		}
	}
	return strings.Join(names, ", ")
}

// unchecked are the registers that nothing was compared with, and what would.
func unchecked(checks []check) []string {
	var out []string
	for _, reg := range registers {
		name := fmt.Sprintf("PCR%d", reg.number)
		if slices.ContainsFunc(checks, func(c check) bool { return c.Name == name }) {
			continue
		}
		switch reg.number {
		case rolePCR:
			name += " (give --role-arn)"
		case instancePCR:
			name += " (give --instance-id)"
		case configPCR:
			name += " (give --config)"
		case 8:
			name += " (of signed images)"
		default:
			name += " (part of PCR0; in --measurements)"
		}
		out = append(out, name)
	}
	return out
}
