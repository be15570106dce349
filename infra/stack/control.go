package stack

import (
	"embed"
	"strconv"
	"strings"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsevents"
	"github.com/aws/aws-cdk-go/awscdk/v2/awseventstargets"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awslambda"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsssm"

	"github.com/keyhold/keyhold/infra/target"
)

//go:embed documents/*.sh
var scripts embed.FS

// parameter of a document. Its pattern is checked by Systems Manager before the
// script is made, since values are put into the text of the script.
type parameter struct{ name, describe, pattern, initial string }

// document is a command that operators and the control function run on hosts.
type document struct {
	id         string
	file       string
	describe   string
	seconds    int
	parameters []parameter
}

func documents() []document {
	const word = `^[a-z0-9][a-z0-9-]{0,62}$`
	return []document{
		{"Drain", "drain.sh", "Let the parent finish or give back its batches, and stop it and its enclave", 90, nil},
		{"Status", "status.sh", "Say how enclave and parent are", 30, nil},
		{"Attest", "attest.sh", "Challenge the enclave with a fresh nonce and verify what it proves", 60, nil},
		{"CreateKeyring", "create-keyring.sh", "Make the keyring of the config, and keys in it", 3600, []parameter{
			{"Algorithm", "secp256k1, ed25519, p256 or rsa2048", `^(secp256k1|ed25519|p256|rsa2048)$`, ""},
			{"Policy", "A policy of the config", word, ""},
			{"Pool", "The pool that gets the keys", word, "default"},
			{"Keys", "How many there shall be in the end", `^[0-9]{1,8}$`, ""},
		}},
	}
}

const (
	controlMinutes = 3
	hookMinutes    = 5 // longer than the function, so that it answers in time
)

// controls makes what operators work with. Nobody logs in to a host.
func (b *build) controls() {
	for _, d := range documents() {
		b.documents = append(b.documents, b.document(d))
	}
	b.control = b.function("ControlFunction", target.ControlFile, &awslambda.FunctionProps{
		Description: str("Starts and stops the fleet, drains instances, reports the backlog"),
		Timeout:     awscdk.Duration_Minutes(num(controlMinutes)), MemorySize: num(256),
		Environment: &map[string]*string{
			"KEYHOLD_STACK": str(b.t.Name()), "KEYHOLD_GROUP": str(b.group), "KEYHOLD_TABLE_PREFIX": str(b.t.TablePrefix()),
			"KEYHOLD_INSTANCES": str(strconv.Itoa(b.instances())), "KEYHOLD_DRAIN": b.documents[0].Ref(),
		},
	})
	b.control.Role().AttachInlinePolicy(b.fleetPolicy())
	b.control.Role().AttachInlinePolicy(b.tablePolicy("ControlTables", controlAccess()))
	b.dataKey.Grant(b.control, *strs("kms:Decrypt", "kms:DescribeKey")...)

	run := awseventstargets.NewLambdaFunction(b.control, &awseventstargets.LambdaFunctionProps{
		Event: awsevents.RuleTargetInput_FromObject(map[string]any{"action": "state"}), RetryAttempts: num(0),
	})
	awsevents.NewRule(b.stack, str("Report"), &awsevents.RuleProps{
		Description: str("Report the backlog"), Targets: &[]awsevents.IRuleTarget{run},
		Schedule: awsevents.Schedule_Rate(awscdk.Duration_Minutes(num(b.t.Profile.StateEvery))),
	})
	awsevents.NewRule(b.stack, str("Terminating"), &awsevents.RuleProps{
		Description: str("Drain an instance before it ends"),
		EventPattern: &awsevents.EventPattern{
			Source: strs("aws.autoscaling"), DetailType: strs("EC2 Instance-terminate Lifecycle Action"),
			Detail: &map[string]any{"AutoScalingGroupName": []string{b.group}},
		},
		Targets: &[]awsevents.IRuleTarget{awseventstargets.NewLambdaFunction(b.control, nil)},
	})
}

// fleetPolicy is for one group, one document, and the instances of that group.
func (b *build) fleetPolicy() awsiam.Policy {
	group := str(b.arn("autoscaling", "autoScalingGroup:*:autoScalingGroupName/"+b.group))
	return awsiam.NewPolicy(b.stack, str("ControlFleet"), &awsiam.PolicyProps{Statements: &[]awsiam.PolicyStatement{
		allow([]string{"autoscaling:CompleteLifecycleAction", "autoscaling:UpdateAutoScalingGroup"}, group),
		allow([]string{"autoscaling:DescribeAutoScalingGroups", "ssm:GetCommandInvocation"}, str("*")),
		allow([]string{"ssm:SendCommand"}, str(b.arn("ssm", "document/"+*b.documents[0].Ref()))),
		allowIf("StringEquals", map[string]any{"ssm:resourceTag/aws:autoscaling:groupName": b.group},
			[]string{"ssm:SendCommand"}, str(b.arn("ec2", "instance/*"))),
	}})
}

// controlAccess is what the report of the backlog needs.
func controlAccess() []access {
	return []access{{"batches", []string{"GetItem"}, []string{"Query"}}}
}

func (b *build) document(d document) awsssm.CfnDocument {
	raw, err := scripts.ReadFile("documents/" + d.file)
	if err != nil {
		panic(err) // it is embedded
	}
	content := map[string]any{
		"schemaVersion": "2.2", "description": d.describe,
		"mainSteps": []any{map[string]any{
			"action": "aws:runShellScript", "name": "run",
			"inputs": map[string]any{"timeoutSeconds": strconv.Itoa(d.seconds), "runCommand": strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n")},
		}},
	}
	parameters := map[string]any{}
	for _, p := range d.parameters {
		q := map[string]any{"type": "String", "description": p.describe, "allowedPattern": p.pattern}
		if p.initial != "" {
			q["default"] = p.initial
		}
		parameters[p.name] = q
	}
	if len(parameters) > 0 {
		content["parameters"] = parameters
	}
	return awsssm.NewCfnDocument(b.stack, str(d.id), &awsssm.CfnDocumentProps{
		DocumentType: str("Command"), DocumentFormat: str("JSON"), UpdateMethod: str("NewVersion"), Content: content,
	})
}
