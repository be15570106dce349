package stack

import (
	"github.com/aws/constructs-go/constructs/v10"
	"github.com/cdklabs/cdk-nag-go/cdknag/v2"
)

// acknowledge says of what cdk-nag finds why it is meant so. Each is for one
// construct and, where the rule has findings of its own, for that finding: another
// wildcard of the same role is found all the same.
func (b *build) acknowledge() {
	account, region, partition := b.t.Account, b.t.Region, b.t.Partition()
	for _, s := range []struct {
		on      constructs.IConstruct
		rule    string
		finding string
		why     string
	}{
		{
			b.role, "AwsSolutions-IAM5", "Resource::*",
			"Being a managed instance (ssm:UpdateInstanceInformation, ssmmessages) and cloudwatch:PutMetricData know no resources; the latter is bound to one namespace.",
		},
		{
			b.stack.Node().FindChild(str("ControlFleet")), "AwsSolutions-IAM5", "Resource::*",
			"autoscaling:DescribeAutoScalingGroups and ssm:GetCommandInvocation know no resources, and only read.",
		},
		{
			b.stack.Node().FindChild(str("ControlFleet")), "AwsSolutions-IAM5",
			"Resource::arn:" + partition + ":autoscaling:" + region + ":" + account + ":autoScalingGroup:*:autoScalingGroupName/" + b.group,
			"The star stands for the id that Auto Scaling gives the group; its name is exact.",
		},
		{
			b.stack.Node().FindChild(str("ControlFleet")), "AwsSolutions-IAM5",
			"Resource::arn:" + partition + ":ec2:" + region + ":" + account + ":instance/*",
			"Instances come and go; a condition on their tag holds it to those of one group, and the other statement to one document.",
		},
		{
			b.stack.Node().FindChild(str("IngestFiles")), "AwsSolutions-IAM5", "Resource::<ArchiveDA4CB258.Arn>/incoming/*",
			"Files below one prefix are what the function is there for.",
		},
		{
			b.stack.Node().FindChild(str("Health")), "AwsSolutions-ELB2", "",
			"A network load balancer logs TLS listeners alone. This one has none, and nobody may connect to it: it asks hosts whether they are ready.",
		},
		{
			b.stack.Node().FindChild(str("Fleet")), "AwsSolutions-AS3", "",
			"Launches and ends are ordinary here and would drown the alarms in the same topic. Errors are sent, and HostsNotReady rings where hosts are missing.",
		},
	} {
		suppression := &cdknag.NagPackSuppression{Id: str(s.rule), Reason: str(s.why)}
		if s.finding != "" {
			suppression.AppliesTo = &[]any{s.finding}
		}
		cdknag.NagSuppressions_AddResourceSuppressions(s.on, &[]*cdknag.NagPackSuppression{suppression}, yes)
	}
}
