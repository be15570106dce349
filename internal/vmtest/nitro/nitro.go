// Package nitro lets QEMU's nitro-enclave machine judge Keyhold's images. It has
// tests only, which run with make vm-test-nitro and are skipped without.
//
// That machine reads the image file itself, with a reader that is not ours: it
// checks the checksum, and computes PCR0, 1, 2 and 8, which its NSM then reports.
// What it is not: the kernel is one of Debian's source with the options of
// scripts/nitro-machine.config, the documents of its NSM are not signed, so nothing
// here verifies one, and it is neither AWS's reader nor the Nitro hypervisor.
package nitro
