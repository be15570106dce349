package plan_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// preflight runs the script in a copy of infra/, with commands that answer so.
func preflight(t *testing.T, commands map[string]string) (string, error) {
	t.Helper()
	root := t.TempDir()
	for _, file := range []string{"scripts/preflight", "package.json"} {
		raw, err := os.ReadFile(filepath.Join("..", file))
		if err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(root, file), string(raw))
	}
	for name, text := range commands {
		path := filepath.Join(root, "bin", name)
		if name == "cdk" {
			path = filepath.Join(root, "node_modules/.bin", name)
		}
		if text != "" {
			put(t, path, "#!/bin/bash\n"+text+"\n")
		}
	}
	// The tools of the script itself, and no others: what is not faked is missing.
	for _, tool := range []string{"bash", "env", "sed", "head", "dirname"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Skip(tool + " is missing")
		}
		if err := os.Symlink(path, filepath.Join(root, "bin", tool)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(root, "scripts/preflight"), "eu-central-1")
	cmd.Env = []string{"PATH=" + filepath.Join(root, "bin")}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestWhatADeploymentWouldStumbleOverIsToldBefore(t *testing.T) {
	t.Parallel()
	good := map[string]string{
		"node": "echo v22.1.0", "cdk": "echo '2.1148.1 (build abc)'",
		"aws": `case "$1" in sts) echo 111122223333 ;; ssm) echo 25 ;; esac`,
	}
	for _, test := range []struct{ name, command, answer, want string }{
		{"all is well", "", "", "preflight: account 111122223333, region eu-central-1, CDK CLI 2.1148.1"},
		{"no Node", "node", "", "Node.js is missing"},
		{"an old Node", "node", "echo v18.0.0", "too old"},
		{"no CDK CLI", "cdk", "", "run npm ci in infra/"},
		{"the CDK CLI that npm calls latest", "cdk", "echo '3.0.0 (build x)'", "the CDK CLI is 3.0.0, and 2.1148.1 is wanted"},
		{"no AWS CLI", "aws", "", "the AWS CLI is missing"},
		{"no credentials", "aws", "exit 255", "there are no AWS credentials"},
		{"no bootstrap", "aws", `[ "$1" = sts ] && echo 111122223333`, "account 111122223333 has not been prepared for CDK in eu-central-1: npx cdk bootstrap"},
		{"an old bootstrap", "aws", `case "$1" in sts) echo 111122223333 ;; ssm) echo 6 ;; esac`, "prepared by an old CDK"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			commands := map[string]string{}
			for name, text := range good {
				commands[name] = text
			}
			if test.command != "" {
				commands[test.command] = test.answer
			}
			out, err := preflight(t, commands)
			if (err == nil) != (test.command == "") || !strings.Contains(out, test.want) {
				t.Errorf("%v, and it says: %s", err, out)
			}
		})
	}
}
