package doctor_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/doctor"
	"github.com/keyhold/keyhold/parent/watch"
)

const (
	goodPCR  = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"
	otherPCR = "ffb2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"
	device   = "dev/nitro_enclaves"
	yaml     = "etc/nitro_enclaves/allocator.yaml"
	pages    = "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
	bigPages = "sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages"
	cpus     = "sys/module/nitro_enclaves/parameters/ne_cpus"
	image    = "usr/lib/keyhold/keyhold.eif"
	measured = "usr/lib/keyhold/measurements.json"
	cfg      = "etc/keyhold/config.json"
)

var (
	errFake = errors.New("not here")
	noon    = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
)

// patient is a host on which all is well; tests take something away.
type patient struct {
	doctor.Host
	doctor.Settings
	files    fstest.MapFS
	enclaves []watch.Enclave
	offset   time.Duration // of the enclave's clock
	v1       int           // status with which IMDSv1 answers
	free     uint64
	asked    []string // hosts that were asked for TLS
}

func measurements(pcr0 string) string {
	return `{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"` + pcr0 + `","PCR1":"` + goodPCR + `","PCR2":"` + goodPCR + `"}}`
}

func text(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: 0o644} }

func newPatient(t *testing.T) *patient {
	t.Helper()
	raw, err := config.Encode(&config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000001",
		Keyring: "main", Epochs: []uint32{1}, SealEpoch: 1,
		Policies:  []config.Policy{{Name: "default", Kinds: []record.Kind{record.Message}}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	})
	if err != nil {
		t.Fatal(err)
	}
	p := &patient{v1: http.StatusUnauthorized, free: 20 << 30}
	p.files = fstest.MapFS{
		device:       {Mode: os.ModeDevice | 0o660, Sys: &syscall.Stat_t{Gid: 990}},
		"etc/group":  text("root:x:0:\nne:x:990:ec2-user,keyhold-enclave\n"),
		"etc/passwd": text("root:x:0:0::/root:/bin/sh\nkeyhold-enclave:x:980:980::/:/usr/sbin/nologin\n"),
		yaml:         text("---\n# a comment: with a colon\nmemory_mib: 1024\ncpu_count: 2\n"),
		pages:        text("512\n"), bigPages: text("0\n"), cpus: text("1,3\n"),
		image:    {Data: bytes.Repeat([]byte{1}, 3<<20), Mode: 0o644},
		measured: text(measurements(goodPCR)),
		cfg:      text(string(raw)),
	}
	p.enclaves = []watch.Enclave{{Name: "keyhold-16", CID: 16, CPUs: 2, MemoryMiB: 1024, State: watch.StateRunning, Flags: watch.FlagsNone}}
	p.Settings = doctor.Settings{
		Config: "/" + cfg, EIF: "/" + image, Measurements: []string{"/" + measured}, CID: 16, MemoryMiB: 1024, CPUs: 2,
		Listen: "127.0.0.1:9464", User: "keyhold-enclave",
	}
	p.Host = doctor.Host{
		Files:        p.files,
		NitroVersion: func(context.Context) (string, error) { return "Nitro CLI 1.4.2", nil },
		Enclaves:     func(context.Context) ([]watch.Enclave, error) { return p.enclaves, nil },
		Measure: func(context.Context, string) (eif.Measurements, error) {
			return eif.Measurements{PCR0: goodPCR, PCR1: goodPCR, PCR2: goodPCR}, nil
		},
		LocalCID:    func() (uint32, error) { return 3, nil },
		Probe:       func(context.Context) (time.Time, error) { return noon.Add(p.offset), nil },
		HTTP:        p.imds,
		Credentials: func(context.Context) (time.Time, error) { return noon.Add(time.Hour), nil },
		Tables:      func(context.Context) error { return nil },
		TLS: func(_ context.Context, host string) error {
			p.asked = append(p.asked, host)
			return nil
		},
		Listen:    func(context.Context, string) error { return nil },
		Ready:     func(context.Context, string) (string, error) { return "1 of 1 enclaves ready", nil },
		Disk:      func(string) (uint64, error) { return p.free, nil },
		OpenFiles: func() (uint64, error) { return 1 << 20, nil },
		Now:       func() time.Time { return noon },
	}
	return p
}

func (p *patient) imds(r *http.Request) (*http.Response, error) {
	status := p.v1
	if r.Method == http.MethodPut {
		status = http.StatusOK
	}
	h := http.Header{}
	h.Set("Date", noon.Add(p.offset).Format(http.TimeFormat))
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader("a-session-token"))}, nil
}

func TestNothingIsWrongWithAGoodHost(t *testing.T) {
	p := newPatient(t)
	r, err := doctor.Run(t.Context(), p.Host, p.Settings, nil)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, f := range r.Findings {
		ids = append(ids, f.ID)
		if f.Result != doctor.OK || f.Text == "" || f.Next != "" {
			t.Errorf("%+v", f)
		}
	}
	if !r.OK || r.Err() != nil || !slices.Equal(ids, doctor.IDs()) || len(ids) < 20 {
		t.Errorf("ok %v, %v, %v", r.OK, r.Err(), ids)
	}
	if !slices.Equal(p.asked, []string{"kms.eu-central-1.amazonaws.com"}) {
		t.Errorf("asked for TLS: %v", p.asked)
	}
}

// late is a context's end as the network reports it.
func late(context.Context) error { return context.DeadlineExceeded }

func TestEachCheckFindsWhatIsWrong(t *testing.T) {
	list := func(edit func(*watch.Enclave)) func(*patient) {
		return func(p *patient) { edit(&p.enclaves[0]) }
	}
	put := func(name, content string) func(*patient) {
		return func(p *patient) { p.files[name] = text(content) }
	}
	without := func(name string) func(*patient) {
		return func(p *patient) { delete(p.files, name) }
	}
	for _, tt := range []struct {
		id   string
		name string
		harm func(*patient)
		want doctor.Result
		text string // in the text or the next step
	}{
		{"nitro_device", "no device", without(device), doctor.Fail, "EnclaveOptions"},
		{"nitro_device", "of another group", func(p *patient) { p.files[device].Sys = &syscall.Stat_t{Gid: 0} }, doctor.Fail, "group ne"},
		{"nitro_device", "closed to the group", func(p *patient) { p.files[device].Mode = os.ModeDevice | 0o600 }, doctor.Fail, "group ne"},
		{"nitro_device", "no group", put("etc/group", "root:x:0:\n"), doctor.Fail, "dnf install"},
		{"nitro_device", "no user", put("etc/passwd", "root:x:0:0::/:/bin/sh\n"), doctor.Fail, "deploy/install"},
		{"nitro_device", "a user outside of the group", put("etc/group", "ne:x:990:ec2-user\n"), doctor.Fail, "usermod"},
		{"nitro_device", "a user whose own group it is", func(p *patient) {
			p.files["etc/group"] = text("ne:x:990:\n")
			p.files["etc/passwd"] = text("keyhold-enclave:x:980:990::/:/bin/false\n")
		}, doctor.OK, "may use it"},
		{"nitro_cli", "missing", func(p *patient) {
			p.NitroVersion = func(context.Context) (string, error) { return "", errFake }
		}, doctor.Fail, "dnf install"},
		{"nitro_cli", "too old", func(p *patient) {
			p.NitroVersion = func(context.Context) (string, error) { return "Nitro CLI 1.0.12", nil }
		}, doctor.Fail, "describe-eif"},
		{"nitro_cli", "something else", func(p *patient) {
			p.NitroVersion = func(context.Context) (string, error) { return "\x1b[2Jhello", nil }
		}, doctor.Warn, "as expected"},
		{"allocator_file", "missing", without(yaml), doctor.Fail, "deploy/install"},
		{"allocator_file", "too little memory", put(yaml, "---\nmemory_mib: 512\ncpu_count: 2\n"), doctor.Fail, "1024 MiB"},
		{"allocator_file", "too few CPUs", put(yaml, "---\nmemory_mib: 2048\ncpu_pool: 1\n"), doctor.Fail, "2 vCPUs"},
		{"allocator_file", "a pool of CPUs", put(yaml, "memory_mib: 2048\ncpu_pool: 2,3,6-9\n"), doctor.OK, "6 vCPUs"},
		{"allocator_file", "several enclaves", put(yaml, "- memory_mib: 512\n  cpu_count: 2\n- memory_mib: 2048\n  cpu_count: 4\n"), doctor.OK, "2048 MiB"},
		{"allocator_file", "a key of nobody", put(yaml, "memory: 2048\ncpu_count: 2\n"), doctor.Fail, "not what the allocator reads"},
		{"allocator_file", "a number that is none", put(yaml, "memory_mib: 1GiB\ncpu_count: 2\n"), doctor.Fail, "not what the allocator reads"},
		{"allocator_file", "half a reservation", put(yaml, "memory_mib: 2048\n"), doctor.Fail, "not what the allocator reads"},
		{"allocator_file", "empty", put(yaml, "---\n"), doctor.Fail, "not what the allocator reads"},
		{"allocator_memory", "nothing reserved", put(pages, "0\n"), doctor.Fail, "0 MiB"},
		{"allocator_memory", "one large page", func(p *patient) {
			p.files[pages], p.files[bigPages] = text("0\n"), text("1\n")
		}, doctor.OK, "1024 MiB"},
		{"allocator_memory", "half on each of two nodes", func(p *patient) {
			p.files[pages] = text("256\n")
			p.files["sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"] = text("256\n")
		}, doctor.Fail, "512 MiB"},
		{"allocator_memory", "no nodes", func(p *patient) {
			delete(p.files, pages)
			delete(p.files, bigPages)
		}, doctor.Skip, "nodes"},
		{"allocator_cpus", "no driver", without(cpus), doctor.Fail, "modprobe"},
		{"allocator_cpus", "none", put(cpus, "\n"), doctor.Fail, "0 vCPUs"},
		{"allocator_cpus", "a list that is none", put(cpus, "1-\n"), doctor.Fail, "needed"},
		{"image_file", "missing", without(image), doctor.Fail, "one build"},
		{"image_file", "another image", func(p *patient) {
			p.Measure = func(context.Context, string) (eif.Measurements, error) {
				return eif.Measurements{PCR0: otherPCR}, nil
			}
		}, doctor.Fail, otherPCR},
		{"image_file", "a damaged image", func(p *patient) {
			p.Measure = func(context.Context, string) (eif.Measurements, error) { return eif.Measurements{}, errFake }
		}, doctor.Fail, "no whole image"},
		{"image_file", "no measurements", without(measured), doctor.Fail, "measurements.json"},
		{"image_file", "measurements of a debug image", put(measured, measurements(strings.Repeat("0", 96))), doctor.Fail, "zero"},
		{"image_file", "nothing to compare with", func(p *patient) { p.Measurements = nil }, doctor.Skip, "no measurements"},
		{"image_file", "a PCR0 instead of a file", func(p *patient) { p.Measurements, p.PCR0 = nil, []string{goodPCR} }, doctor.OK, "as wanted"},
		{"image_file", "not set", func(p *patient) { p.EIF = "" }, doctor.Skip, "no image"},
		{"image_memory", "below four times", func(p *patient) { p.MemoryMiB = 11 }, doctor.Fail, "12 MiB"},
		{"image_memory", "exactly four times", func(p *patient) { p.MemoryMiB = 12 }, doctor.OK, "12 MiB"},
		{"image_memory", "not there", without(image), doctor.Skip, "not there"},
		{"config_file", "missing", without(cfg), doctor.Fail, "keyhold config build"},
		{"config_file", "with a space at its end", func(p *patient) {
			p.files[cfg] = text(string(p.files[cfg].Data) + " ")
		}, doctor.Fail, "keyhold config validate"},
		{"config_file", "not set", func(p *patient) { p.Config = "" }, doctor.Skip, "no config"},
		{"vsock", "does not work", func(p *patient) { p.LocalCID = func() (uint32, error) { return 0, errFake } }, doctor.Fail, "modprobe"},
		{"vsock", "of another machine", func(p *patient) { p.LocalCID = func() (uint32, error) { return 2, nil } }, doctor.Warn, "context id 2"},
		{"enclave_running", "none", func(p *patient) { p.enclaves = nil }, doctor.Fail, "systemctl start keyhold-enclave"},
		{"enclave_running", "of somebody else", list(func(e *watch.Enclave) { e.Name = "other" }), doctor.Fail, "did not start"},
		{"enclave_running", "ending", list(func(e *watch.Enclave) { e.State = "TERMINATING" }), doctor.Fail, "about to end"},
		{"enclave_running", "nobody can say", func(p *patient) {
			p.Enclaves = func(context.Context) ([]watch.Enclave, error) { return nil, errFake }
		}, doctor.Warn, "E39"},
		{"enclave_running", "it is listed though not all could be", func(p *patient) {
			p.Enclaves = func(context.Context) ([]watch.Enclave, error) { return p.enclaves, errFake }
		}, doctor.OK, "runs"},
		{"enclave_mode", "debug", list(func(e *watch.Enclave) { e.Flags = watch.FlagsDebug }), doctor.Fail, "DEBUG MODE"},
		{"enclave_mode", "no enclave", func(p *patient) { p.enclaves = nil }, doctor.Skip, "no enclave"},
		{"enclave_answers", "it hangs", func(p *patient) {
			p.Probe = func(ctx context.Context) (time.Time, error) { return time.Time{}, late(ctx) }
		}, doctor.Fail, "no answer in time"},
		{"enclave_answers", "no enclave", func(p *patient) { p.enclaves = nil }, doctor.Skip, "no enclave"},
		{"imds", "no token", func(p *patient) {
			p.HTTP = func(*http.Request) (*http.Response, error) { return nil, errFake }
		}, doctor.Fail, "http-put-response-hop-limit 1"},
		{"imds", "version 1 answers as well", func(p *patient) { p.v1 = http.StatusOK }, doctor.Warn, "IMDSv1 is on"},
		{"credentials", "no role", func(p *patient) {
			p.Credentials = func(context.Context) (time.Time, error) { return time.Time{}, errFake }
		}, doctor.Fail, "profile"},
		{"credentials", "about to expire", func(p *patient) {
			p.Credentials = func(context.Context) (time.Time, error) { return noon.Add(time.Minute), nil }
		}, doctor.Warn, "expire"},
		{"credentials", "without end", func(p *patient) {
			p.Credentials = func(context.Context) (time.Time, error) { return time.Time{}, nil }
		}, doctor.OK, "gives credentials"},
		{"tables", "missing", func(p *patient) { p.Tables = func(context.Context) error { return refusal.TablesMissing } }, doctor.Fail, "keyhold tables create"},
		{"tables", "denied", func(p *patient) { p.Tables = func(context.Context) error { return refusal.StoreDenied } }, doctor.Fail, "DescribeTable"},
		{"tables", "out of reach", func(p *patient) { p.Tables = late }, doctor.Fail, "gateway endpoint"},
		{"kms_endpoint", "out of reach", func(p *patient) {
			p.TLS = func(ctx context.Context, _ string) error { return late(ctx) }
		}, doctor.Fail, "interface endpoint"},
		{"kms_endpoint", "nobody knows which", without(cfg), doctor.Skip, "config"},
		{"parent_port", "taken by the parent", func(p *patient) {
			p.Host.Listen = func(context.Context, string) error { return errFake }
		}, doctor.OK, "1 of 1 enclaves ready"},
		{"parent_port", "taken by a stranger", func(p *patient) {
			p.Host.Listen = func(context.Context, string) error { return errFake }
			p.Ready = func(context.Context, string) (string, error) { return "", errFake }
		}, doctor.Fail, "ss -ltnp"},
		{"parent_port", "none", func(p *patient) { p.Settings.Listen = "" }, doctor.Skip, "no HTTP"},
		{"disk", "low", func(p *patient) { p.free = 500 << 20 }, doctor.Warn, "500 MiB"},
		{"disk", "full", func(p *patient) { p.free = 1 << 20 }, doctor.Fail, "1 MiB"},
		{"open_files", "few", func(p *patient) { p.OpenFiles = func() (uint64, error) { return 1024, nil } }, doctor.Warn, "ulimit"},
	} {
		t.Run(tt.id+": "+tt.name, func(t *testing.T) {
			p := newPatient(t)
			tt.harm(p)
			r, err := doctor.Run(t.Context(), p.Host, p.Settings, []string{tt.id})
			if err != nil || len(r.Findings) != 1 {
				t.Fatalf("%v, %+v", err, r)
			}
			f := r.Findings[0]
			if f.Result != tt.want || !strings.Contains(f.Text+" "+f.Next, tt.text) {
				t.Errorf("got %+v, want %s with %q", f, tt.want, tt.text)
			}
			if (f.Next != "") != (f.Result == doctor.Warn || f.Result == doctor.Fail) {
				t.Errorf("a next step belongs to what is wrong, and to nothing else: %+v", f)
			}
			if (f.Result == doctor.Fail) != errors.Is(r.Err(), refusal.HostUnfit) || (f.Result == doctor.Fail) == r.OK {
				t.Errorf("result %s, error %v, ok %v", f.Result, r.Err(), r.OK)
			}
		})
	}
}

func TestTheClockIsComparedWithTheBestOneThereIs(t *testing.T) {
	for _, tt := range []struct {
		name   string
		offset time.Duration
		only   []string
		want   doctor.Result
		text   string
	}{
		{"right", 100 * time.Millisecond, []string{"enclave_answers", "clock"}, doctor.OK, "the enclave's"},
		{"slow", 2 * time.Second, []string{"enclave_answers", "clock"}, doctor.Warn, "chronyc"},
		{"very slow", time.Minute, []string{"enclave_answers", "clock"}, doctor.Fail, "not valid yet"},
		{"very fast", -time.Hour, []string{"enclave_answers", "clock"}, doctor.Fail, "too old"},
		{"right by the metadata service", 0, []string{"imds", "clock"}, doctor.OK, "the metadata service's"},
		{"slow by the metadata service", time.Minute, []string{"imds", "clock"}, doctor.Fail, "the metadata service's"},
		{"the enclave's counts more", 0, []string{"enclave_answers", "imds", "clock"}, doctor.OK, "the enclave's"},
		{"nobody to compare with", 0, []string{"clock"}, doctor.Skip, "no clock"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPatient(t)
			p.offset = tt.offset
			r, err := doctor.Run(t.Context(), p.Host, p.Settings, tt.only)
			if err != nil {
				t.Fatal(err)
			}
			if f := r.Findings[len(r.Findings)-1]; f.ID != "clock" || f.Result != tt.want || !strings.Contains(f.Text+f.Next, tt.text) {
				t.Errorf("got %+v", f)
			}
		})
	}
}

func TestAnUnknownCheckIsRefused(t *testing.T) {
	p := newPatient(t)
	if _, err := doctor.Run(t.Context(), p.Host, p.Settings, []string{"everything"}); !errors.Is(err, refusal.UsageWrong) || !strings.Contains(err.Error(), "nitro_device") {
		t.Errorf("got %v", err)
	}
}

func TestAMachineThatLacksEverythingIsLookedAtToTheEnd(t *testing.T) {
	r, err := doctor.Run(t.Context(), doctor.Host{Files: fstest.MapFS{}}, doctor.Settings{MemoryMiB: 1024, CPUs: 2, User: "keyhold-enclave"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Findings) != len(doctor.IDs()) || r.OK {
		t.Errorf("%+v", r)
	}
}

func TestPeopleAndProgramsReadTheSame(t *testing.T) {
	p := newPatient(t)
	p.enclaves[0].Flags = watch.FlagsDebug
	r, err := doctor.Run(t.Context(), p.Host, p.Settings, nil)
	if err != nil {
		t.Fatal(err)
	}
	var people, programs bytes.Buffer
	if err := errors.Join(r.Print(&people), r.JSON(&programs)); err != nil {
		t.Fatal(err)
	}
	var got doctor.Report
	if err := json.Unmarshal(programs.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.OK || len(got.Findings) != len(r.Findings) {
		t.Errorf("%s", programs.String())
	}
	for _, f := range got.Findings {
		if !strings.Contains(people.String(), f.ID) || !strings.Contains(people.String(), f.Text) {
			t.Errorf("people do not read %+v", f)
		}
	}
	if !strings.Contains(people.String(), "next: take KEYHOLD_DEBUG_MODE out") || !strings.Contains(people.String(), "19 ok, 0 to look at, 1 wrong, 0 not looked at") {
		t.Errorf("%s", people.String())
	}
	if strings.Contains(people.String()+programs.String(), "a-session-token") {
		t.Error("the session token was printed")
	}
}

func TestAStoppedDoctorSaysSo(t *testing.T) {
	p := newPatient(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := doctor.Run(ctx, p.Host, p.Settings, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
