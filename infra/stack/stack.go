// Package stack is the CloudFormation stack of a Keyhold deployment, one file per
// concern. It grants the keyring's key to nobody: what that key's policy says is
// the matter of package keypolicy alone, and goes into the template as it is.
package stack

import (
	"fmt"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awscloudwatch"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsdynamodb"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsec2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awselasticloadbalancingv2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awskms"
	"github.com/aws/aws-cdk-go/awscdk/v2/awslambda"
	"github.com/aws/aws-cdk-go/awscdk/v2/awss3"
	"github.com/aws/aws-cdk-go/awscdk/v2/awssns"
	"github.com/aws/aws-cdk-go/awscdk/v2/awssqs"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsssm"
	"github.com/aws/constructs-go/constructs/v10"
	"github.com/aws/jsii-runtime-go"
	"github.com/keyhold/keyhold/keypolicy"

	"github.com/keyhold/keyhold/infra/target"
)

// Short names of what every second line needs: CDK takes pointers.
var (
	str  = jsii.String
	strs = jsii.Strings
	num  = func(n int) *float64 { return jsii.Number(n) }
	yes  = jsii.Bool(true)
	no   = jsii.Bool(false)
)

// build is a stack in the making. Its parts are in the order in which they are
// made; each uses those above it.
type build struct {
	stack awscdk.Stack
	t     *target.Target

	// keys
	role    awsiam.Role
	dataKey awskms.Key
	keyring awskms.CfnKey

	// network
	vpc                      awsec2.Vpc
	hosts, endpoints, health awsec2.SecurityGroup

	// data
	tables  []table
	logs    awss3.Bucket
	archive awss3.Bucket

	// observe, the part that the fleet needs
	topic    awssns.Topic
	rollback []awscloudwatch.Alarm
	alarms   []awscloudwatch.Alarm

	// ingest
	queue, dead awssqs.Queue
	ingest      awslambda.Function

	// fleet
	group     string // name of the Auto Scaling group
	ready     awselasticloadbalancingv2.NetworkTargetGroup
	documents []awsssm.CfnDocument
	control   awslambda.Function
}

type table struct {
	name string // without the prefix
	awsdynamodb.Table
}

// New adds the stack of t to an app.
func New(scope constructs.Construct, t *target.Target) (awscdk.Stack, error) {
	policy, err := keypolicy.Build(t.Spec())
	if err != nil {
		return nil, err
	}
	b := &build{t: t}
	b.stack = awscdk.NewStack(scope, str(t.Name()), &awscdk.StackProps{
		StackName: str(t.Name()), Description: str("Keyhold, " + t.Profile.Description),
		Env:                   &awscdk.Environment{Account: &t.Account, Region: &t.Region},
		TerminationProtection: jsii.Bool(t.Profile.Keep),
	})
	// The zones are given. Without this CDK would ask the account for them.
	b.stack.Node().SetContext(str(fmt.Sprintf("availability-zones:account=%s:region=%s", t.Account, t.Region)), t.Zones)
	b.keys(policy)
	b.network()
	b.data()
	b.notify()
	b.intake()
	b.fleet()
	b.controls()
	b.observe()
	b.outputs()
	b.acknowledge()
	return b.stack, nil
}

// removal is what becomes of things that hold something when the stack goes.
func (b *build) removal() awscdk.RemovalPolicy {
	if b.t.Profile.Keep {
		return awscdk.RemovalPolicy_RETAIN
	}
	return awscdk.RemovalPolicy_DESTROY
}

// arn of something of this account and region.
func (b *build) arn(service, rest string) string {
	return fmt.Sprintf("arn:%s:%s:%s:%s:%s", b.t.Partition(), service, b.t.Region, b.t.Account, rest)
}

// outputs are what docs/deploy.md and make deploy-plan refer to.
func (b *build) outputs() {
	for _, o := range []struct {
		name  string
		value *string
	}{
		{"KeyringKeyArn", b.keyring.AttrArn()},
		{"TablePrefix", str(b.t.TablePrefix())},
		{"ArchiveBucketName", b.archive.BucketName()},
		{"IngestQueueUrl", b.queue.QueueUrl()},
		{"AlarmTopicArn", b.topic.TopicArn()},
		{"ControlFunctionName", b.control.FunctionName()},
	} {
		awscdk.NewCfnOutput(b.stack, str(o.name), &awscdk.CfnOutputProps{Value: o.value})
	}
	for _, d := range b.documents {
		awscdk.NewCfnOutput(b.stack, str(*d.Node().Id()+"Document"), &awscdk.CfnOutputProps{Value: d.Ref()})
	}
}

// allow makes a statement.
func allow(actions []string, resources ...*string) awsiam.PolicyStatement {
	return awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{Actions: strs(actions...), Resources: &resources})
}

// allowIf makes a statement with a condition of one operator.
func allowIf(operator string, is map[string]any, actions []string, resources ...*string) awsiam.PolicyStatement {
	return awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
		Actions: strs(actions...), Resources: &resources, Conditions: &map[string]any{operator: is},
	})
}
