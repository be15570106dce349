// Command plan prints the deployments of a first installation (first), or of a
// roll from one release to the next (roll), with what each changes. It deploys
// nothing, needs no account, and refuses values that a deployment would refuse.
//
//	plan first profile=prod arch=amd64 account=111122223333 region=eu-central-1 ami=ami-... release=FOLDER
//	plan roll ... release=FOLDER next=FOLDER
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/jsii-runtime-go"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"

	"github.com/keyhold/keyhold/infra/plan"
	"github.com/keyhold/keyhold/infra/stack"
	"github.com/keyhold/keyhold/infra/target"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "plan: %v\n", err)
		os.Exit(1)
	}
}

const usage = "want first or roll, and then NAME=VALUE for profile, arch, account, region, ami, release, and next for a roll"

// cli is where npm ci puts the CDK CLI, seen from the module's folder.
const cli = "node_modules/.bin/cdk"

func run(args []string) (err error) {
	if len(args) == 0 || args[0] != "first" && args[0] != "roll" {
		return errors.New(usage)
	}
	values, next, err := read(args[1:])
	if err != nil {
		return err
	}
	for _, tool := range []string{"node", cli} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: install Node.js (Debian: apt-get install nodejs npm), and then npm ci in infra/", tool)
		}
	}
	folder, err := os.MkdirTemp("", "keyhold-plan-")
	if err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	defer os.RemoveAll(folder) //nolint:errcheck // a left folder harms nobody
	defer jsii.Close()
	r := plan.Runner{Out: os.Stdout, Folder: folder, Synth: synth, Diff: diff}
	if args[0] == "first" {
		steps := plan.First(values)
		if r.Synth, err = withConfig(values, folder); err != nil {
			return err
		}
		return r.Print(steps, "")
	}
	if next == "" {
		return errors.New("next: want the folder of the next release")
	}
	before, err := synth(values, filepath.Join(folder, "now"))
	if err != nil {
		return err
	}
	return r.Print(plan.Roll(values, next), before)
}

// read makes values of NAME=VALUE; an empty value is none.
func read(args []string) (values map[string]string, next string, err error) {
	values = map[string]string{}
	for _, a := range args {
		name, value, ok := strings.Cut(a, "=")
		switch {
		case !ok:
			return nil, "", errors.New(usage)
		case name == "next":
			next = value
		case !slices.Contains(target.Keys(), name):
			return nil, "", fmt.Errorf("%q is not one of %v", name, target.Keys())
		case value != "":
			values[name] = value
		}
	}
	if values[target.KeyAdmit] == "" {
		values[target.KeyAdmit] = values[target.KeyRelease]
	}
	return values, next, nil
}

// synth writes the template of a deployment. Validation is a matter of make
// infra-check; here it would take most of the time.
func synth(values map[string]string, folder string) (path string, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("CDK: %v", r)
		}
	}()
	t, err := target.Read(func(k string) string { return values[k] })
	if err != nil {
		return "", err
	}
	app := awscdk.NewApp(&awscdk.AppProps{AnalyticsReporting: jsii.Bool(false), Outdir: jsii.String(folder), Context: &map[string]any{
		"@aws-cdk/aws-iam:minimizePolicies": true, "@aws-cdk/aws-ec2:launchTemplateDefaultUserData": true,
		"@aws-cdk/aws-s3:serverAccessLogsUseBucketPolicy": true, "@aws-cdk/core:enablePartitionLiterals": true,
	}})
	if _, err := stack.New(app, t); err != nil {
		return "", err
	}
	app.Synth(nil)
	return filepath.Join(folder, t.Name()+".template.json"), nil
}

// diff lets the CDK CLI compare, which asks no account when it gets a template.
func diff(folder, before string) (string, error) {
	cmd := exec.Command(cli, "diff", "--app", folder, "--template", before, "--no-color", "--no-notices") //nolint:noctx,gosec // G204: it ends by itself; arguments are ours
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(os.Environ(), "CI=true", "CDK_DISABLE_CLI_TELEMETRY=true") // CI: everything to stdout
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("cdk diff: %w: %s", err, strings.TrimSpace(errs.String()))
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		if !strings.HasPrefix(line, "!!") { // what Node says of its own age
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, ""), nil
}

// withConfig lets the later steps of a first installation be shown before there is
// a key, or a config for a sealed one: releases without are copied, with a config
// for a key that does not exist.
func withConfig(values map[string]string, folder string) (func(map[string]string, string) (string, error), error) {
	release := values[target.KeyRelease]
	shown := map[string]string{}
	for dir, mode := range map[string]keypolicy.Mode{release: keypolicy.Managed, plan.Sealed(release): keypolicy.Sealed} {
		if _, err := os.Stat(filepath.Join(dir, target.ConfigFile)); err == nil {
			continue
		}
		to := filepath.Join(folder, filepath.Base(dir))
		if err := example(release, to, mode, values); err != nil {
			return nil, err
		}
		shown[dir] = to
	}
	if shown[release] != "" {
		fmt.Fprintf(os.Stderr, "%s has no %s yet, since the key that it names is made by the first step.\nPCR16 below is that of an example; run this again once there is one.\n", release, target.ConfigFile)
	}
	return func(v map[string]string, to string) (string, error) {
		w := map[string]string{}
		for k, s := range v {
			if w[k] = s; shown[s] != "" {
				w[k] = shown[s]
			}
		}
		return synth(w, to)
	}, nil
}

// example copies a release, with a config.
func example(release, to string, mode keypolicy.Mode, values map[string]string) error {
	if err := os.CopyFS(to, os.DirFS(release)); err != nil {
		return fmt.Errorf("release: want a folder that make dist wrote: %w", err)
	}
	c := &config.Config{
		Version: 1, KMSKeyARN: fmt.Sprintf("arn:aws:kms:%s:%s:key/00000000-0000-0000-0000-000000000000", values[target.KeyRegion], values[target.KeyAccount]),
		Keyring: "main", Epochs: []uint32{1}, SealEpoch: 1,
		Create:    []config.Create{{Algorithm: record.Secp256k1, Policy: "payouts", Max: 1000}},
		Policies:  []config.Policy{{Name: "payouts", Kinds: []record.Kind{record.Message}}},
		KeyPolicy: config.DefaultKeyPolicy(), Lease: config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
	}
	if raw, err := os.ReadFile(filepath.Join(release, target.ConfigFile)); err == nil { //nolint:gosec // G703: the operator says where the release is
		if c, err = config.Parse(raw); err != nil {
			return fmt.Errorf("release %s: %w", release, err)
		}
	}
	c.KeyPolicy.Mode = mode
	raw, err := config.Encode(c)
	if err == nil {
		err = os.WriteFile(filepath.Join(to, target.ConfigFile), raw, 0o644) //nolint:gosec // G306: a config is public
	}
	if err != nil {
		return fmt.Errorf("make a config to show: %w", err)
	}
	return nil
}
