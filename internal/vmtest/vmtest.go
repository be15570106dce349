// Package vmtest boots the enclave images in a virtual machine, with production's
// parent beside it. It has tests only, which run with make vm-test and are skipped
// without.
//
// Three things are stand-ins, and no result says anything about the real ones. The
// NSM is a device of this process that signs with a test's own authority, and its
// registers PCR0 to 2 hold what internal/eif measures of the file that is booted:
// stock QEMU measures nothing. The kernel's NSM driver is that of the image but for
// one byte, the number of its device, which an unmeasured ramdisk behind the image's
// own puts in place. And the machine is an emulated PC with Debian's kernel, not the
// Nitro hypervisor with AWS's.
package vmtest
