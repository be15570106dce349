package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/keyhold/keyhold/internal/wire"
)

const (
	groupNE      = "ne" // of aws-nitro-enclaves-cli: who may start enclaves
	readWrite    = 0o060
	wantedFiles  = 65536     // LimitNOFILE of keyhold-parent.service
	lowDisk      = 1 << 30   // bytes: look at it
	noDisk       = 100 << 20 // bytes: logs and core files end here
	nextPackage  = "dnf install aws-nitro-enclaves-cli"
	nextInstall  = "run deploy/install, which puts files and users there"
	nextAllocate = "systemctl restart nitro-enclaves-allocator (with no enclave running), and look at journalctl -u nitro-enclaves-allocator"
)

func (e *exam) nitroDevice(context.Context) Finding {
	const device = "/dev/nitro_enclaves"
	info, err := fs.Stat(e.Files, inside(device))
	if errors.Is(err, fs.ErrNotExist) {
		return fail("there is no "+device+": the instance was not launched with enclaves, or the driver is not loaded",
			"launch it with EnclaveOptions Enabled=true (a stopped instance: aws ec2 modify-instance-attribute --attribute enclaveOptions --value true), then modprobe nitro_enclaves")
	}
	if err != nil {
		return skip(device + " could not be looked at")
	}
	group, users, err := e.members(groupNE)
	if err != nil {
		return fail("there is no group "+groupNE, nextPackage)
	}
	owner, known := groupOf(info)
	if !known || owner != group || info.Mode().Perm()&readWrite != readWrite {
		return fail(device+" does not belong to group "+groupNE+", or the group may not use it", "udevadm trigger -y nitro_enclaves, or install the package again: "+nextPackage)
	}
	account, err := e.entry("/etc/passwd", e.User, 4)
	if err != nil {
		return fail("there is no user "+e.User, nextInstall)
	}
	if account[3] != strconv.Itoa(group) && !slices.Contains(users, e.User) {
		return fail("user "+e.User+" is not in group "+groupNE, "usermod -aG "+groupNE+" "+e.User)
	}
	return good("%s is there, and %s may use it", device, e.User)
}

var versionPattern = regexp.MustCompile(`^Nitro CLI (\d{1,4})\.(\d{1,4})\.(\d{1,4})$`)

func (e *exam) nitroCLI(ctx context.Context) Finding {
	if e.NitroVersion == nil {
		return skip("nitro-cli is not looked for")
	}
	text, err := e.NitroVersion(ctx)
	if err != nil {
		return fail("nitro-cli does not run", nextPackage)
	}
	m := versionPattern.FindStringSubmatch(text)
	if m == nil {
		return warn("nitro-cli runs, but does not say its version as expected", nextPackage)
	}
	// --enclave-name and describe-eif came with 1.1.
	if m[1] == "0" || m[1] == "1" && m[2] == "0" {
		return fail(text+" is too old: it has no describe-eif", "dnf update aws-nitro-enclaves-cli")
	}
	return good("%s", text)
}

func (e *exam) allocatorFile(context.Context) Finding {
	const file = "/etc/nitro_enclaves/allocator.yaml"
	next := "set memory_mib and cpu_count in " + file + ", then " + nextAllocate
	b, err := e.read(file)
	if err != nil {
		return fail(file+" cannot be read", nextInstall)
	}
	pools, err := parseAllocator(string(b))
	if err != nil {
		return fail(file+" is "+err.Error(), next)
	}
	for _, p := range pools {
		if p.memoryMiB >= e.MemoryMiB && p.cpus >= e.CPUs {
			return good("reserves %d MiB and %d vCPUs", p.memoryMiB, p.cpus)
		}
	}
	return fail(fmt.Sprintf("reserves less than the %d MiB and %d vCPUs that the enclave is to have", e.MemoryMiB, e.CPUs), next)
}

// allocatorMemory adds up huge pages by node: an enclave takes them from one.
func (e *exam) allocatorMemory(context.Context) Finding {
	nodes, err := fs.Glob(e.Files, "sys/devices/system/node/node*")
	if err != nil || len(nodes) == 0 {
		return skip("the kernel shows no memory nodes")
	}
	most := 0
	for _, node := range nodes {
		total := 0
		sizes, err := fs.Glob(e.Files, node+"/hugepages/hugepages-*kB")
		if err != nil {
			return skip("the kernel shows no huge pages")
		}
		for _, dir := range sizes {
			kib, err := strconv.Atoi(strings.TrimSuffix(dir[strings.LastIndex(dir, "-")+1:], "kB"))
			if err != nil {
				continue
			}
			pages, err := e.number("/" + dir + "/nr_hugepages")
			if err != nil {
				continue
			}
			total += pages * kib / 1024
		}
		most = max(most, total)
	}
	if most < e.MemoryMiB {
		return fail(fmt.Sprintf("%d MiB of huge pages are reserved on one node, %d are needed", most, e.MemoryMiB), nextAllocate)
	}
	return good("%d MiB of huge pages are reserved", most)
}

func (e *exam) allocatorCPUs(context.Context) Finding {
	b, err := e.read("/sys/module/nitro_enclaves/parameters/ne_cpus")
	if err != nil {
		return fail("the enclave driver shows no CPUs", "modprobe nitro_enclaves, then "+nextAllocate)
	}
	n, err := countCPUs(string(b))
	if err != nil || n < e.CPUs {
		return fail(fmt.Sprintf("%d vCPUs are reserved, %d are needed", n, e.CPUs), nextAllocate)
	}
	return good("%d vCPUs are reserved", n)
}

func (e *exam) vsock(context.Context) Finding {
	if e.LocalCID == nil {
		return skip("vsock is not looked at")
	}
	cid, err := e.LocalCID()
	if err != nil {
		return fail("vsock does not work: /dev/vsock cannot be asked", "modprobe vhost_vsock or vsock, and look at ls -l /dev/vsock")
	}
	if cid != wire.ParentCID {
		return warn(fmt.Sprintf("this machine has context id %d; enclaves know their parent as %d", cid, wire.ParentCID), "run it on the instance that starts the enclave")
	}
	return good("vsock works; this machine is context id %d", cid)
}

func (e *exam) parentPort(ctx context.Context) Finding {
	if e.Settings.Listen == "" || e.Host.Listen == nil {
		return skip("the parent serves no HTTP")
	}
	address := e.Settings.Listen
	if e.Host.Listen(ctx, address) == nil {
		return good("%s is free; no parent runs there", address)
	}
	if e.Ready != nil {
		if text, err := e.Ready(ctx, address); err == nil {
			return good("the parent serves at %s: %s", address, text)
		}
	}
	return fail(address+" is taken, and not by a parent that answers", "find who has it with ss -ltnp, or set KEYHOLD_LISTEN in /etc/keyhold/parent.env")
}

func (e *exam) disk(context.Context) Finding {
	if e.Disk == nil {
		return skip("the disk is not looked at")
	}
	for _, path := range []string{"/", "/var/log"} {
		free, err := e.Disk(path)
		if err != nil {
			return skip("the file system of " + path + " does not say what is free")
		}
		next := "journalctl --vacuum-size=200M, or a larger volume"
		if free < noDisk {
			return fail(fmt.Sprintf("%s has %d MiB left", path, free>>20), next)
		}
		if free < lowDisk {
			return warn(fmt.Sprintf("%s has %d MiB left", path, free>>20), next)
		}
	}
	return good("more than 1 GiB is free")
}

func (e *exam) openFiles(context.Context) Finding {
	if e.OpenFiles == nil {
		return skip("the limit on open files is not looked at")
	}
	limit, err := e.OpenFiles()
	if err != nil {
		return skip("the limit on open files is not known")
	}
	if limit < wantedFiles {
		return warn(fmt.Sprintf("%d open files are allowed to this session; keyhold-parent.service has %d", limit, wantedFiles), "run the parent as the service, or raise it with ulimit -Hn")
	}
	return good("%d open files are allowed", limit)
}
