package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/signclient"
)

// registers that are shown, and what they measure.
var registers = []struct {
	number int
	text   string
}{
	{0, "image"},
	{1, "kernel and boot"},
	{2, "application"},
	{3, "IAM role of the instance"},
	{4, "instance"},
	{8, "signing certificate of the image"},
	{16, "config"},
}

// attestReport is the JSON of attest. Where Verified is false, everything else
// is the enclave's word and proved by nothing.
type attestReport struct {
	Verified   bool              `json:"verified"`
	Problem    *string           `json:"problem"`
	Enclave    string            `json:"enclave"`
	State      string            `json:"state"`
	BootID     string            `json:"boot_id"`
	ModuleID   string            `json:"module_id"`
	Time       string            `json:"time"` // of the document
	AgeSeconds float64           `json:"age_seconds"`
	PCRs       map[string]string `json:"pcrs"`
	WantPCR16  string            `json:"want_pcr16"` // of --config
	Keyring    *attestedKeyring  `json:"keyring"`    // null while none is open
	Lanes      []attestedLane    `json:"lanes"`
}

type attestedKeyring struct {
	Name          string `json:"name"`
	Epoch         uint32 `json:"epoch"`
	Fingerprint   string `json:"fingerprint"`
	KMSKeyARN     string `json:"kms_key_arn"`
	KeyPolicyMode string `json:"key_policy_mode"`
}

type attestedLane struct {
	Lane uint32 `json:"lane"`
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"`
}

func attestCmd() *cobra.Command {
	var enclave cli.EnclaveOptions
	var want cli.AttestOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "attest",
		Short: "Let an enclave prove what it is, now",
		Long: `Challenge an enclave with a fresh nonce, verify its attestation document up to
Amazon's root, and print what it proves: image (PCR0 to 2 and 8), config (PCR16),
instance (PCR4) and role (PCR3), the boot, and the newest receipt of every lane,
signed by the receipt key that the document names. Keep the lanes' heads outside:
receipts that are withheld later are missed by them.

The exit code is 1 where anything is not as wanted. What is printed then is the
enclave's own word, proved by nothing.`,
		Example: `  keyhold attest --enclave vsock:16 --pcr0 3f9c...07 --config config.json

  # With what nitro-cli build-enclave printed
  nitro-cli build-enclave --docker-uri keyhold --output-file k.eif > eif.json
  keyhold attest --enclave vsock:16 --measurements eif.json --config config.json

  # A witness: note the heads of the lanes every hour
  keyhold attest --json | jq -c '{boot_id, time, lanes}' >> heads.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			w, err := readWanted(&want, c.ErrOrStderr())
			if err != nil {
				return err
			}
			client, err := connect(c.Context(), &enclave)
			if err != nil {
				return err
			}
			defer client.Close()
			p, document, refused := challenge(c.Context(), client, &w)
			if document == nil { // nothing was shown at all
				return fmt.Errorf("enclave at %s: %w", enclave.Address, refused)
			}
			r := newAttestReport(enclave.Address, client, &w, &p)
			if refused != nil {
				r.refuse(document, refused)
			}
			if asJSON {
				err = cli.PrintJSON(c.OutOrStdout(), r)
			} else {
				_, err = io.WriteString(c.OutOrStdout(), r.text())
			}
			return errors.Join(err, refused)
		},
	}
	enclave.AddFlags(c)
	want.AddFlags(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func newAttestReport(address string, c *signclient.Client, w *wanted, p *proof) *attestReport {
	pcr := config.PCR16(w.raw)
	r := &attestReport{
		Verified: true, Enclave: address, State: string(c.Hello().State), BootID: c.BootID().String(),
		WantPCR16: hex.EncodeToString(pcr[:]), Lanes: []attestedLane{},
	}
	r.show(&p.document, p.at)
	if s := p.statement; s != nil {
		r.Keyring = &attestedKeyring{s.Keyring, s.Epoch, hex.EncodeToString(s.Fingerprint[:]), s.KMSKeyARN, string(s.Mode)}
	}
	if p.heads != nil {
		for _, h := range p.heads.Lanes {
			r.Lanes = append(r.Lanes, attestedLane{h.Lane, h.Seq, hex.EncodeToString(h.Hash[:])})
		}
	}
	return r
}

func (r *attestReport) show(d *attestation.Document, at time.Time) {
	r.ModuleID, r.Time = d.ModuleID, d.Timestamp.Format(time.RFC3339Nano)
	r.AgeSeconds = at.Sub(d.Timestamp).Seconds()
	r.PCRs = map[string]string{}
	for _, reg := range registers {
		if v := d.PCRs[reg.number]; len(v) > 0 {
			r.PCRs[fmt.Sprint(reg.number)] = hex.EncodeToString(v)
		}
	}
}

// refuse shows what the enclave says of itself, so that an operator sees what is
// not as wanted.
func (r *attestReport) refuse(document []byte, why error) {
	text := why.Error()
	r.Verified, r.Problem = false, &text
	r.Keyring, r.Lanes = nil, []attestedLane{}
	if d, err := attestation.Parse(document); err == nil {
		r.show(d, time.Now())
	}
}

func (r *attestReport) text() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{name}, args...)...)
	}
	if r.Verified {
		line("VERIFIED", "the enclave at %s is a wanted image with the wanted config, and is there now", r.Enclave)
	} else {
		line("REFUSED", "%s", refusal.AttestFailed)
		line("", "what follows is the enclave's own word, proved by nothing")
	}
	line("boot", "%s (%s)", r.BootID, r.State)
	line("module", "%s", dash(r.ModuleID))
	line("document", "%s, %.1f s old", r.Time, r.AgeSeconds)
	for _, reg := range registers {
		if v, ok := r.PCRs[fmt.Sprint(reg.number)]; ok {
			line(fmt.Sprintf("PCR%d", reg.number), "%s  %s", registerText(v), reg.text)
		}
	}
	if got := r.PCRs["16"]; got == r.WantPCR16 {
		line("", "PCR16 is that of --config")
	} else {
		line("wanted PCR16", "%s  of --config", r.WantPCR16)
	}
	if k := r.Keyring; k != nil {
		line("keyring", "%s#%d, fingerprint %s", k.Name, k.Epoch, k.Fingerprint)
		line("KMS key", "%s, its policy: %s", k.KMSKeyARN, k.KeyPolicyMode)
	} else if r.Verified {
		line("keyring", "none is open yet")
	}
	for _, l := range r.Lanes {
		line(fmt.Sprintf("lane %d", l.Lane), "%d receipts, the newest %s", l.Seq, l.Hash)
	}
	return b.String()
}

// registerText shortens a register that was never extended.
func registerText(v string) string {
	if strings.Trim(v, "0") == "" {
		return "zero"
	}
	return v
}
