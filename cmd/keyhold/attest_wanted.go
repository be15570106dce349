package main

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"maps"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

// Registers that the hypervisor, not the image, fills.
const (
	rolePCR     = 3
	instancePCR = 4
)

var (
	roleForm     = regexp.MustCompile(`^arn:(aws|aws-cn|aws-us-gov):iam::\d{12}:role/[\x21-\x7e]{1,512}$`)
	instanceForm = regexp.MustCompile(`^i-([0-9a-f]{8}|[0-9a-f]{17})$`)
)

// attestOptions are the flags of attest.
type attestOptions struct {
	enclave  cli.EnclaveOptions
	want     cli.AttestOptions
	role     string // ARN
	instance string // id
	any      bool   // config
	document string // file; in place of an enclave
	save     string // file
	asJSON   bool
}

func (o *attestOptions) addFlags(c *cobra.Command) {
	o.enclave.AddFlags(c)
	o.want.AddFlags(c)
	f := c.Flags()
	f.StringVar(&o.role, "role-arn", "", "`ARN` of the IAM role of the instance, which PCR3 must hold")
	f.StringVar(&o.instance, "instance-id", "", "`id` of the instance, which PCR4 must hold")
	f.BoolVar(&o.any, "any-config", false, "do not compare PCR16: for an image whose config is not yours")
	f.StringVar(&o.document, "document", "", "verify a stored document in place of an enclave: `file`, raw or base64, - for stdin")
	f.StringVar(&o.save, "save", "", "keep the document in this `file`, also one that is refused")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
}

// wanted is what must be proved, with the registers of role and instance.
func (o *attestOptions) wanted(c *cobra.Command) (w wanted, err error) {
	registers, err := o.hostRegisters()
	if err != nil {
		return w, err
	}
	if o.any {
		w, err = o.anyConfig(c)
	} else {
		w, err = readWanted(&o.want, c.ErrOrStderr())
	}
	if err != nil {
		return w, err
	}
	for _, img := range w.images {
		for i := range 3 {
			if v, named := img.PCRs[i]; named && len(bytes.Trim(v, "\x00")) == 0 {
				return w, cli.Usagef("PCR%d of a wanted image is zero: that is what a debug enclave shows, whatever its image", i)
			}
		}
		maps.Copy(img.PCRs, registers)
	}
	return w, nil
}

// anyConfig wants images without a config.
func (o *attestOptions) anyConfig(c *cobra.Command) (w wanted, err error) {
	if c.Flags().Changed("config") {
		return w, cli.Usagef("--config and --any-config exclude each other")
	}
	if w.images, err = o.want.Images(); err != nil {
		return w, err
	}
	w.root, err = o.want.Root(c.ErrOrStderr())
	return w, err
}

var errAssumed = errors.New("want the role itself, arn:aws:iam::ACCOUNT:role/NAME with its path: not an assumed role, and not an instance profile")

// hostRegisters are those of --role-arn and --instance-id.
func (o *attestOptions) hostRegisters() (map[int][]byte, error) {
	out := map[int][]byte{}
	if o.role != "" {
		if !roleForm.MatchString(o.role) {
			return nil, cli.Usagef("--role-arn: %w", errAssumed)
		}
		out[rolePCR] = extendedOnce(o.role)
	}
	if o.instance != "" {
		if !instanceForm.MatchString(o.instance) {
			return nil, cli.Usagef("--instance-id: want i- and 17 hex digits")
		}
		out[instancePCR] = extendedOnce(o.instance)
	}
	return out, nil
}

// extendedOnce is the value of a register of zeros that was extended with text:
// SHA-384(48 zero bytes || text). Unlike the registers of an image, these are not
// hashed before. Source: Nitro Enclaves User Guide, "Where to get an enclave's
// measurements", PCR3 and PCR4.
func extendedOnce(text string) []byte {
	sum := sha512.Sum384(append(make([]byte, sha512.Size384), text...))
	return sum[:]
}
