package archtest_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// coldEnv makes the test compile everything in each folder. Without it the compiled packages come from the
// shared cache, where the folder is no part of the key as long as -trimpath stands in the flags.
const coldEnv = "KEYHOLD_COLD_BUILD"

func TestAProgramIsTheSameBytesFromTwoFolders(t *testing.T) {
	if testing.Short() {
		t.Skip("builds twice")
	}
	folders := []string{copyOfTheModule(t, "a"), copyOfTheModule(t, "a-longer-name/b")}
	for _, program := range []string{"keyhold-enclave", "keyhold-parent"} {
		t.Run(program, func(t *testing.T) {
			var sums []string
			var programs [][]byte
			for _, folder := range folders {
				var env []string
				if os.Getenv(coldEnv) == "1" {
					env = append(env, "GOCACHE="+t.TempDir())
				}
				raw, err := os.ReadFile(build(t, folder, buildLine(t, program), program, env...))
				if err != nil {
					t.Fatal(err)
				}
				for _, path := range append(pathsOfThisMachine(t), folder) {
					if bytes.Contains(raw, []byte(path)) {
						t.Errorf("%s holds the path %s", program, path)
					}
				}
				sum := sha256.Sum256(raw)
				sums, programs = append(sums, hex.EncodeToString(sum[:])), append(programs, raw)
			}
			if sums[0] != sums[1] {
				t.Errorf("the bytes differ: %s", sums)
			}
			t.Logf("SHA-256 %s", sums[0])
			if program == "keyhold-enclave" {
				giveOnePCR0(t, programs)
			}
		})
	}
}

func TestTheSearchForPathsFindsTheOneOfThisModule(t *testing.T) {
	name, err := os.Executable() // go test builds without -trimpath
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(raw, []byte(moduleRoot(t))) {
		t.Skip("these tests were built with -trimpath")
	}
	if paths := pathsOfThisMachine(t); len(paths) != 3 {
		t.Errorf("the paths to search for are %q, want 3", paths)
	}
}

// pathsOfThisMachine are what a build could pick up.
func pathsOfThisMachine(t *testing.T) []string {
	t.Helper()
	cmd := goCommand(t, "env", "GOMODCACHE", "GOCACHE")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ask go where it keeps things: %v", err)
	}
	return append(strings.Fields(string(out)), moduleRoot(t))
}

// copyOfTheModule copies what the programs are built of.
func copyOfTheModule(t *testing.T, name string) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), name)
	for _, tree := range trees {
		source := filepath.Join(moduleRoot(t), tree)
		if err := os.CopyFS(filepath.Join(folder, tree), os.DirFS(source)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"go.mod", "go.sum"} {
		raw, err := os.ReadFile(filepath.Join(moduleRoot(t), file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, file), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}
