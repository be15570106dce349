package dynoxide_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
)

// supervisorEnv makes this test binary a supervisor that runs a server over the named file until it is killed.
const supervisorEnv = "KEYHOLD_TEST_SUPERVISOR_DB"

func TestMain(m *testing.M) {
	if path := os.Getenv(supervisorEnv); path != "" {
		supervise(path)
		return
	}
	goleak.VerifyTestMain(m)
}

func supervise(path string) {
	server, err := dynoxide.Start(context.Background(), dynoxide.Options{DBPath: path})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return // the test misses the endpoint
	}
	fmt.Fprintln(os.Stdout, server.Endpoint())
	<-server.Done()
}

func client(t *testing.T, endpoint string) *dynamodb.Client {
	t.Helper()
	return dynamodb.New(dynamodb.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String(endpoint),
		Credentials:  credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "example", ""),
		HTTPClient:   awshttp.New(awshttp.Options{}),
	})
}

func tables(t *testing.T, endpoint string) []string {
	t.Helper()
	out, err := client(t, endpoint).ListTables(t.Context(), &dynamodb.ListTablesInput{})
	if err != nil {
		t.Fatalf("list tables: %v", err)
	}
	return out.TableNames
}

func createTable(t *testing.T, endpoint, name string) {
	t.Helper()
	_, err := client(t, endpoint).CreateTable(t.Context(), &dynamodb.CreateTableInput{
		TableName:            aws.String(name),
		BillingMode:          types.BillingModePayPerRequest,
		AttributeDefinitions: []types.AttributeDefinition{{AttributeName: aws.String("id"), AttributeType: types.ScalarAttributeTypeS}},
		KeySchema:            []types.KeySchemaElement{{AttributeName: aws.String("id"), KeyType: types.KeyTypeHash}},
	})
	if err != nil {
		t.Fatalf("create table: %v", err)
	}
}

func TestWhatWasWrittenSurvivesKill(t *testing.T) {
	options := dynoxide.Options{DBPath: filepath.Join(t.TempDir(), "new", "dynamo.db")}
	first := dynoxidetest.Start(t, options)
	createTable(t, first.Endpoint(), "batches")
	if err := first.Kill(); err != nil {
		t.Fatalf("kill: %v", err)
	}
	select {
	case <-first.Done():
	default:
		t.Error("Kill returned before the server had ended")
	}
	second := dynoxidetest.Start(t, options)
	if diff := cmp.Diff([]string{"batches"}, tables(t, second.Endpoint())); diff != "" {
		t.Errorf("tables after a kill and a start (-want +got):\n%s", diff)
	}
}

func TestASecondServerOnOneDatabaseIsRefused(t *testing.T) {
	options := dynoxide.Options{DBPath: filepath.Join(t.TempDir(), "dynamo.db")}
	first := dynoxidetest.Start(t, options)
	if _, err := dynoxide.Start(t.Context(), options); !errors.Is(err, dynoxide.ErrInUse) {
		t.Fatalf("second start: %v, want ErrInUse", err)
	}
	if err := first.Stop(t.Context()); err != nil {
		t.Fatalf("stop: %v", err)
	}
	if err := first.Stop(t.Context()); err != nil {
		t.Errorf("stop of a stopped server: %v", err)
	}
	dynoxidetest.Start(t, options)
}

func TestAServerEndsWithItsKilledSupervisorAndFreesTheDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dynamo.db")
	probe := dynoxidetest.Start(t, dynoxide.Options{DBPath: path}) // skips where there is no dynoxide
	if err := probe.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	supervisor := exec.CommandContext(t.Context(), os.Args[0])
	supervisor.Env = append(os.Environ(), supervisorEnv+"="+path)
	supervisor.Stderr = t.Output()
	out, err := supervisor.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := supervisor.Start(); err != nil {
		t.Fatal(err)
	}
	endpoint, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the supervisor named no endpoint: %v", err)
	}
	createTable(t, strings.TrimSpace(endpoint), "batches")
	if _, err := dynoxide.Start(t.Context(), dynoxide.Options{DBPath: path}); !errors.Is(err, dynoxide.ErrInUse) {
		t.Errorf("start while the supervisor runs: %v, want ErrInUse", err)
	}
	if err := supervisor.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = supervisor.Wait() // it was killed

	// The lock is the server's too: it is free only if the server has ended.
	server := dynoxidetest.Start(t, dynoxide.Options{DBPath: path})
	if diff := cmp.Diff([]string{"batches"}, tables(t, server.Endpoint())); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
}

func TestAServerOutlivesTheThreadThatAskedForIt(t *testing.T) {
	var server *dynoxide.Server
	var err error
	thread := onEndingThread(func() { server, err = dynoxide.Start(t.Context(), dynoxide.Options{}) })
	if errors.Is(err, dynoxide.ErrNotFound) {
		dynoxidetest.Endpoint(t) // skips or fails
	}
	if err != nil {
		t.Fatal(err)
	}
	waitForThreadEnd(t, thread)
	if got := tables(t, server.Endpoint()); len(got) != 0 {
		t.Errorf("tables %q, want none", got)
	}
	if err := server.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// onEndingThread runs f on a thread that ends after it, and returns the thread's id.
func onEndingThread(f func()) int {
	id := make(chan int)
	go func() {
		runtime.LockOSThread()
		thread := syscall.Gettid()
		if thread == syscall.Getpid() { // the main thread never ends: keep it busy and use another
			id <- onEndingThread(f)
			runtime.UnlockOSThread()
			return
		}
		f()
		id <- thread // the goroutine stays locked, so the runtime ends the thread with it
	}()
	return <-id
}

func waitForThreadEnd(t *testing.T, thread int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", thread)); errors.Is(err, os.ErrNotExist) {
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatal("the thread did not end")
		}
	}
}

func TestAPortInUseIsNamedAsSuch(t *testing.T) {
	other := dynoxidetest.Start(t, dynoxide.Options{}) // skips where there is no dynoxide
	_, port, err := net.SplitHostPort(strings.TrimPrefix(other.Endpoint(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	var number int
	if _, err := fmt.Sscan(port, &number); err != nil {
		t.Fatal(err)
	}
	if _, err := dynoxide.Start(t.Context(), dynoxide.Options{Port: number}); !errors.Is(err, dynoxide.ErrPortInUse) {
		t.Errorf("start on a taken port: %v, want ErrPortInUse", err)
	}
}

func TestAPortTakenInTheMeantimeIsReplaced(t *testing.T) {
	installed, err := dynoxide.Find()
	if err != nil {
		dynoxidetest.Endpoint(t) // skips or fails
	}
	mark := filepath.Join(t.TempDir(), "tried")
	binary := script(t, fmt.Sprintf(`
if [ ! -e %[1]q ]; then touch %[1]q; echo "error: port is already in use" >&2; exit 1; fi
exec %[2]q "$@"`, mark, installed))
	server := dynoxidetest.Start(t, dynoxide.Options{Binary: binary})
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("the first attempt was not made: %v", err)
	}
	if got := tables(t, server.Endpoint()); len(got) != 0 {
		t.Errorf("tables %q, want none", got)
	}
}

func TestAFailedStartTellsWhatTheServerSaid(t *testing.T) {
	binary := script(t, `echo "disk is full" >&2; exit 3`)
	_, err := dynoxide.Start(t.Context(), dynoxide.Options{Binary: binary})
	if err == nil || !strings.Contains(err.Error(), "disk is full") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error %v, want the exit status and what was printed", err)
	}
}

func TestAFailedStartFreesTheDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dynamo.db")
	binary := script(t, `exit 1`)
	for range 2 {
		_, err := dynoxide.Start(t.Context(), dynoxide.Options{Binary: binary, DBPath: path})
		if err == nil || errors.Is(err, dynoxide.ErrInUse) {
			t.Errorf("error %v, want a failed start", err)
		}
	}
}

func TestAServerThatNeverListensIsGivenUpAndKilled(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "pid")
	binary := script(t, fmt.Sprintf(`echo $$ >%q; exec sleep 600`, mark))
	_, err := dynoxide.Start(t.Context(), dynoxide.Options{Binary: binary, StartTimeout: time.Second})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want DeadlineExceeded", err)
	}
	pid, err := os.ReadFile(mark)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the child is still there: %v", err)
	}
}

func TestFindLooksInOrder(t *testing.T) {
	module := t.TempDir()
	installed := filepath.Join(module, "tools", "node_modules", "@dynoxide", "linux-x64", "dynoxide")
	write(t, filepath.Join(module, "go.mod"), "module example\n", 0o600)
	write(t, installed, "#!/bin/sh\n", 0o700)
	inside := filepath.Join(module, "internal", "store")
	if err := os.MkdirAll(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	onPath := t.TempDir()
	write(t, filepath.Join(onPath, "dynoxide"), "#!/bin/sh\n", 0o700)

	for _, tc := range []struct {
		name, env, wd, path string
		want                string
		err                 error
	}{
		{name: "named by the environment", env: installed, wd: t.TempDir(), path: onPath, want: installed},
		{name: "named but not there", env: filepath.Join(module, "none"), wd: inside, path: onPath, err: os.ErrNotExist},
		{name: "in the module around the working directory", wd: inside, path: onPath, want: installed},
		{name: "on the path", wd: t.TempDir(), path: onPath, want: filepath.Join(onPath, "dynoxide")},
		{name: "nowhere", wd: t.TempDir(), path: t.TempDir(), err: dynoxide.ErrNotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv(dynoxide.BinaryEnv, tc.env)
			t.Setenv("PATH", tc.path)
			t.Chdir(tc.wd)
			got, err := dynoxide.Find()
			if got != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("found %q, %v; want %q, %v", got, err, tc.want, tc.err)
			}
		})
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dynoxide")
	write(t, path, "#!/bin/sh\n"+body+"\n", 0o700)
	return path
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}
