// Command infra makes the CloudFormation template of a Keyhold deployment for the
// CDK CLI. It refuses, before anything is deployed, what package target refuses.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/jsii-runtime-go"

	"github.com/keyhold/keyhold/infra/stack"
	"github.com/keyhold/keyhold/infra/target"
)

func main() {
	err := run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "infra: %v\n", err)
		os.Exit(1)
	}
}

func run() (err error) {
	if _, err := exec.LookPath("node"); err != nil {
		return errors.New("no Node.js here, on which CDK runs (Debian: apt-get install nodejs npm; versions 22 and 24 are supported)")
	}
	defer jsii.Close()
	// What goes wrong on the side of Node arrives as a panic.
	defer func() {
		if r := recover(); r != nil {
			err = errors.Join(err, fmt.Errorf("CDK: %v", r))
		}
	}()
	app := awscdk.NewApp(&awscdk.AppProps{AnalyticsReporting: jsii.Bool(false)})
	t, err := target.Read(func(key string) string {
		if v, ok := app.Node().TryGetContext(jsii.String(key)).(string); ok {
			return v
		}
		// The CLI knows whose credentials it has.
		switch key {
		case target.KeyAccount:
			return os.Getenv("CDK_DEFAULT_ACCOUNT")
		case target.KeyRegion:
			return os.Getenv("CDK_DEFAULT_REGION")
		}
		return ""
	})
	if err != nil {
		return err
	}
	if _, err := stack.New(app, t); err != nil {
		return err
	}
	app.Synth(nil)
	return nil
}
