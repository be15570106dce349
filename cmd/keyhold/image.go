package main

import (
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
)

func imageCmd() *cobra.Command {
	return noun("image", "Build, describe, measure and verify enclave images",
		imageBuildCmd(), imageDescribeCmd(), imageMeasureCmd(), imageVerifyCmd())
}

// envEpoch is the variable by which builds that shall be reproducible are told
// the time (reproducible-builds.org).
const envEpoch = "SOURCE_DATE_EPOCH"

// imageParts are the flags that say what an image is built of.
type imageParts struct {
	arch       string
	kernel     string // folder of scripts/kernel
	blobs      string // AWS's folder, in place of kernel
	init       string
	cmdline    string
	name       string
	nsmBuiltIn bool
	key, cert  string // files in PEM; both or neither
}

func (p *imageParts) addFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&p.arch, "arch", string(eif.AMD64), "architecture `name`, amd64 or arm64")
	f.StringVar(&p.kernel, "kernel", "", "`folder` with bzImage, version and modules, as scripts/kernel writes it (default dist/kernel/ARCH)")
	f.StringVar(&p.blobs, "blobs", "", "`folder` with AWS's bzImage, cmdline and nsm.ko, in place of --kernel")
	f.StringVar(&p.init, "init", "bin/keyhold-enclave", "the enclave's program, a static `file`")
	f.StringVar(&p.cmdline, "cmdline", "", "the kernel's command line as `text` (default: Keyhold's own, or that of --blobs)")
	f.StringVar(&p.name, "name", "", "`name` of the image, which is not measured (default keyhold)")
	f.BoolVar(&p.nsmBuiltIn, "nsm-built-in", false, "the kernel has the driver of the NSM built in, so no module is missing")
	f.StringVar(&p.key, "signing-key", "", "sign with this P-384 key, a PEM `file`; needs --signing-certificate")
	f.StringVar(&p.cert, "signing-certificate", "", "certificate of the signing key, a PEM `file`; it is measured in PCR8")
	c.MarkFlagsMutuallyExclusive("kernel", "blobs")
	c.MarkFlagsRequiredTogether("signing-key", "signing-certificate")
}

// given tells whether any flag says what to build of.
func (p *imageParts) given(c *cobra.Command) bool {
	for _, name := range []string{"arch", "kernel", "blobs", "init", "cmdline", "nsm-built-in", "signing-key"} {
		if c.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// build assembles the image and signs it where that is asked for.
func (p *imageParts) build(now time.Time) (eif.Image, error) {
	parts := image.Parts{Arch: eif.Arch(p.arch), Name: p.name, NSMBuiltIn: p.nsmBuiltIn, Cmdline: image.DefaultCmdline}
	if parts.Arch != eif.AMD64 && parts.Arch != eif.ARM64 {
		return eif.Image{}, cli.Usagef("--arch: %w", image.ErrArch)
	}
	var err error
	if parts.BuildTime, err = buildTime(); err != nil {
		return eif.Image{}, err
	}
	if p.blobs != "" {
		parts.Kernel, parts.Modules, parts.Cmdline, err = image.ReadBlobs(p.blobs, parts.Arch)
	} else {
		folder := p.kernel
		if folder == "" {
			folder = filepath.Join("dist", "kernel", p.arch)
		}
		parts.Kernel, parts.Modules, err = image.ReadKernel(folder, parts.Arch)
	}
	if err != nil {
		return eif.Image{}, err
	}
	if p.cmdline != "" {
		parts.Cmdline = p.cmdline
	}
	if parts.Init, err = image.ReadFile(p.init); err != nil {
		return eif.Image{}, err
	}
	m, err := image.Build(parts)
	if err != nil {
		return eif.Image{}, err
	}
	if p.key != "" {
		err = p.sign(&m, now)
	}
	return m, err
}

// buildTime is a fixed one unless the environment says another, so that the same
// parts are the same file. It is not measured.
func buildTime() (time.Time, error) {
	text := os.Getenv(envEpoch)
	if text == "" {
		return time.Unix(0, 0), nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil || seconds < 0 || seconds > 253402300799 { // the end of the year 9999
		return time.Time{}, cli.Usagef("%s: want seconds since 1970", envEpoch)
	}
	return time.Unix(seconds, 0), nil
}
