package dynoxide

import (
	"os"
	"os/exec"
	"path/filepath"
)

// BinaryEnv names the binary, before any other place is looked at.
const BinaryEnv = "KEYHOLD_DYNOXIDE"

// inModule is where `make tools` installs the binary.
var inModule = filepath.Join("tools", "node_modules", "@dynoxide", "linux-x64", "dynoxide")

// Find returns the binary's path. It looks into KEYHOLD_DYNOXIDE, the module around the working
// directory, the module around the running program (bin/keyhold-local), the program's own folder, and PATH.
func Find() (string, error) {
	if named := os.Getenv(BinaryEnv); named != "" {
		return exec.LookPath(named) // a name that does not work is an error, not a reason to look on
	}
	var places []string
	if wd, err := os.Getwd(); err == nil {
		places = append(places, moduleBinary(wd))
	}
	if program, err := os.Executable(); err == nil {
		folder := filepath.Dir(program)
		places = append(places, moduleBinary(folder), filepath.Join(folder, "dynoxide"))
	}
	for _, place := range places {
		if place == "" {
			continue
		}
		if found, err := exec.LookPath(place); err == nil {
			return found, nil
		}
	}
	if found, err := exec.LookPath("dynoxide"); err == nil {
		return found, nil
	}
	return "", ErrNotFound
}

// moduleBinary is the binary's place in the module that folder lies in, or empty.
func moduleBinary(folder string) string {
	for {
		if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
			return filepath.Join(folder, inModule)
		}
		parent := filepath.Dir(folder)
		if parent == folder {
			return ""
		}
		folder = parent
	}
}
