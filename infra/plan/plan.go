// Package plan lists the deployments of a first installation and of a roll, with
// the commands as they are typed and what each of them changes. It deploys nothing
// and asks no account.
package plan

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/keyhold/keyhold/infra/target"
)

// Step is one thing to do.
type Step struct {
	Title  string
	Why    string
	Before []string          // commands before the deployment
	Values map[string]string // of the deployment; nil: there is none
	After  []string          // commands after it
}

// Command is how cdk is called for a deployment.
func (s *Step) Command() string {
	var b strings.Builder
	b.WriteString("npx cdk deploy --app 'go run -buildvcs=false .'")
	for _, k := range target.Keys() {
		if v := s.Values[k]; v != "" {
			if strings.ContainsAny(v, " ") {
				v = "'" + v + "'"
			}
			b.WriteString(" \\\n    -c " + k + "=" + v)
		}
	}
	return b.String()
}

// with returns values with some changed.
func with(values map[string]string, pairs ...string) map[string]string {
	out := maps.Clone(values)
	for i := 0; i+1 < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

// First is the way from nothing to a fleet that signs. There is no circle in it:
// the config needs the key's ARN, and the key's policy the config's hash, so the
// key is made first and released to nobody.
func First(values map[string]string) []Step {
	release, name, region := values[target.KeyRelease], "keyhold-"+values[target.KeyProfile], values[target.KeyRegion]
	output := func(key string) string {
		return fmt.Sprintf("$(aws cloudformation describe-stacks --region %s --stack-name %s --query \"Stacks[0].Outputs[?OutputKey=='%s'].OutputValue\" --output text)", region, name, key)
	}
	return []Step{
		{
			Title: "Make everything, and release the key to nobody",
			Why:   "No instance runs yet: none could become ready.",
			Before: []string{
				"scripts/preflight " + region,
				fmt.Sprintf("npx cdk bootstrap aws://%s/%s", values[target.KeyAccount], region),
			},
			Values: with(values, target.KeyAdmit, target.AdmitNone, target.KeyKeyring, "", target.KeySeal, ""),
			After: []string{
				"arn=" + output("KeyringKeyArn"),
				fmt.Sprintf("keyhold config build --kms-key-arn \"$arn\" -o %s/%s", release, target.ConfigFile),
			},
		},
		{
			Title:  "Release the key to this image with this config, and let keyrings be made",
			Why:    "GenerateDataKey is open to the pair, the hosts may store sealed keys, and nothing is replaced for not being ready.",
			Values: with(values, target.KeyAdmit, release, target.KeyKeyring, target.KeyringCreate, target.KeySeal, ""),
			After: []string{
				fmt.Sprintf("host=$(aws autoscaling describe-auto-scaling-groups --region %s --auto-scaling-group-names %s-parents --query 'AutoScalingGroups[0].Instances[0].InstanceId' --output text)", region, name),
				"document=" + output("CreateKeyringDocument"),
				fmt.Sprintf("aws ssm send-command --region %s --instance-ids \"$host\" --document-name \"$document\" --parameters Algorithm=secp256k1,Policy=payouts,Pool=default,Keys=100", region),
			},
		},
		{
			Title:  "Close the creation of keys",
			Why:    "GenerateDataKey is denied to everybody, the hosts may no longer store keys, and a host that is not ready is replaced.",
			Values: with(values, target.KeyAdmit, release, target.KeyKeyring, target.KeyringClosed, target.KeySeal, ""),
		},
		{
			Title: "Optional, and for ever: seal the key",
			Why: "Nobody but AWS can change the policy afterwards: no new image, no new config, no way back. Practise it with a stack " +
				"that is thrown away (docs/deploy.md) before. The fleet stands still meanwhile: if anything failed after the policy is sealed, CloudFormation could not put the old one back.",
			Before: []string{
				fmt.Sprintf("cp -r %s %s", release, Sealed(release)),
				"arn=" + output("KeyringKeyArn"),
				fmt.Sprintf("keyhold config build --mode sealed --force --kms-key-arn \"$arn\" -o %s/%s", Sealed(release), target.ConfigFile),
				"control=" + output("ControlFunctionName"),
				invoke(region, "stop"),
			},
			Values: with(values, target.KeyRelease, Sealed(release), target.KeyAdmit, Sealed(release), target.KeyKeyring, target.KeyringClosed, target.KeySeal, target.SealWords),
			After:  []string{invoke(region, "start")},
		},
	}
}

// invoke calls the control function.
func invoke(region, action string) string {
	return fmt.Sprintf("aws lambda invoke --region %s --function-name \"$control\" --cli-binary-format raw-in-base64-out --payload '{\"action\":\"%s\"}' /dev/stdout", region, action)
}

// Sealed is the folder of a release whose config is for a sealed key: the mode is
// measured, so it is another pair.
func Sealed(release string) string { return release + "-sealed" }

// Roll is the way from a release to the next. Going back before the last step is
// the deployment before it, again.
func Roll(values map[string]string, next string) []Step {
	old := values[target.KeyRelease]
	both := old + "," + next
	return []Step{
		{
			Title:  "Admit both",
			Why:    "The key policy alone changes: no instance is touched.",
			Values: with(values, target.KeyAdmit, both),
		},
		{
			Title:  "Run the next one",
			Why:    "Instances are replaced one by one; an alarm on attestation rolls the refresh back. The key policy stays as it is.",
			Values: with(values, target.KeyRelease, next, target.KeyAdmit, both),
		},
		{
			Title:  "Retire the old one",
			Why:    "The key policy alone changes. Enclaves of the old pair that still run wipe their keys within revalidate_every.",
			Values: with(values, target.KeyRelease, next, target.KeyAdmit, next),
		},
	}
}

// Change is a resource that differs between two templates.
type Change struct {
	ID, Type string
	How      string   // "made", "changed", "removed"
	What     []string // properties of a changed one
}

type template struct {
	Resources map[string]resource
}

type resource struct {
	Type       string
	Properties map[string]any
	rest       map[string]any
}

// UnmarshalJSON keeps everything beside the properties too.
func (r *resource) UnmarshalJSON(raw []byte) error {
	type plain resource
	if err := json.Unmarshal(raw, (*plain)(r)); err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &r.rest); err != nil {
		return err
	}
	delete(r.rest, "Properties")
	return nil
}

// Changes compares two templates; before may be empty, which is none.
func Changes(before, after string) ([]Change, error) {
	a, b := template{}, template{}
	for path, to := range map[string]*template{before: &a, after: &b} {
		if path == "" {
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("compare templates: %w", err)
		}
		if err := json.Unmarshal(raw, to); err != nil {
			return nil, fmt.Errorf("compare templates: %w", err)
		}
	}
	var out []Change
	for _, id := range slices.Sorted(maps.Keys(union(a.Resources, b.Resources))) {
		old, was := a.Resources[id]
		now, is := b.Resources[id]
		switch {
		case !was:
			out = append(out, Change{ID: id, Type: now.Type, How: "made"})
		case !is:
			out = append(out, Change{ID: id, Type: old.Type, How: "removed"})
		case !reflect.DeepEqual(old, now):
			c := Change{ID: id, Type: now.Type, How: "changed"}
			for _, name := range slices.Sorted(maps.Keys(union(old.Properties, now.Properties))) {
				if !reflect.DeepEqual(old.Properties[name], now.Properties[name]) {
					c.What = append(c.What, name)
				}
			}
			if !reflect.DeepEqual(old.rest, now.rest) {
				c.What = append(c.What, "(attributes)")
			}
			out = append(out, c)
		}
	}
	return out, nil
}

func union[V any](a, b map[string]V) map[string]V {
	out := maps.Clone(a)
	if out == nil {
		out = map[string]V{}
	}
	maps.Copy(out, b)
	return out
}

// Runner does what a plan cannot do by itself.
type Runner struct {
	Out    io.Writer
	Folder string // for assemblies
	// Synth writes the assembly of some values into a folder and returns the path
	// of its template.
	Synth func(values map[string]string, folder string) (string, error)
	// Diff shows the difference between a template and an assembly.
	Diff func(folder, before string) (string, error)
}

// Print writes steps, with the changes of each against the one before it. Those of
// the first are against before, a template, or nothing where that is empty.
func (r *Runner) Print(steps []Step, before string) error {
	var b strings.Builder
	for i, s := range steps {
		fmt.Fprintf(&b, "\n== %d. %s\n%s\n", i+1, s.Title, s.Why)
		for _, c := range s.Before {
			fmt.Fprintf(&b, "\n  %s\n", c)
		}
		if s.Values != nil {
			fmt.Fprintf(&b, "\n  %s\n", s.Command())
			text, after, err := r.changes(s, i, before)
			if err != nil {
				return fmt.Errorf("step %d, %s: %w", i+1, s.Title, err)
			}
			b.WriteString(text)
			before = after
		}
		for _, c := range s.After {
			fmt.Fprintf(&b, "\n  %s\n", c)
		}
		if _, err := io.WriteString(r.Out, b.String()); err != nil {
			return fmt.Errorf("print the plan: %w", err)
		}
		b.Reset()
	}
	return nil
}

func (r *Runner) changes(s Step, i int, before string) (text, after string, err error) {
	folder := filepath.Join(r.Folder, fmt.Sprintf("step-%d", i+1))
	if after, err = r.Synth(s.Values, folder); err != nil {
		return "", "", err
	}
	list, err := Changes(before, after)
	if err != nil {
		return "", "", err
	}
	var b strings.Builder
	switch {
	case before == "":
		kinds := map[string]int{}
		for _, c := range list {
			kinds[c.Type]++
		}
		fmt.Fprintf(&b, "\nIt makes %d resources:\n", len(list))
		for _, k := range slices.Sorted(maps.Keys(kinds)) {
			fmt.Fprintf(&b, "  %3d %s\n", kinds[k], k)
		}
		return b.String(), after, nil
	case len(list) == 0:
		b.WriteString("\nIt changes nothing.\n")
		return b.String(), after, nil
	}
	b.WriteString("\nIt changes:\n")
	for _, c := range list {
		fmt.Fprintf(&b, "  %s %s, a %s", c.How, c.ID, c.Type)
		if len(c.What) > 0 {
			fmt.Fprintf(&b, ": %s", strings.Join(c.What, ", "))
		}
		b.WriteString("\n")
	}
	shown, err := r.Diff(folder, before)
	if err != nil {
		return "", "", err
	}
	b.WriteString("\n" + shown)
	return b.String(), after, nil
}
