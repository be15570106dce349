package stack

import (
	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsec2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awslogs"

	"github.com/keyhold/keyhold/infra/target"
)

const (
	addresses = "10.42.0.0/24" // 59 usable in each zone; it is peered with nothing
	subnet    = 26
)

// network makes two isolated subnets. There is no internet gateway and no NAT:
// what is not an endpoint below cannot be reached.
func (b *build) network() {
	b.vpc = awsec2.NewVpc(b.stack, str("Vpc"), &awsec2.VpcProps{
		IpAddresses: awsec2.IpAddresses_Cidr(str(addresses)), AvailabilityZones: strs(b.t.Zones...), NatGateways: num(0),
		CreateInternetGateway: no, RestrictDefaultSecurityGroup: no, // by a custom resource; nothing is in that group
		SubnetConfiguration: &[]*awsec2.SubnetConfiguration{{
			Name: str("parents"), SubnetType: awsec2.SubnetType_PRIVATE_ISOLATED, CidrMask: num(subnet),
		}},
	})
	b.vpc.AddFlowLog(str("Flow"), &awsec2.FlowLogOptions{
		Destination: awsec2.FlowLogDestination_ToCloudWatchLogs(b.logGroup("FlowLogs"), nil),
		TrafficType: awsec2.FlowLogTrafficType_ALL,
	})
	b.groups()
	b.gateways()
	b.interfaces()
}

// logGroup makes one that is encrypted and ends some day.
func (b *build) logGroup(id string) awslogs.LogGroup {
	retention := awslogs.RetentionDays_ONE_WEEK
	if b.t.Profile.LogDays > 7 {
		retention = awslogs.RetentionDays_THREE_MONTHS
	}
	return awslogs.NewLogGroup(b.stack, str(id), &awslogs.LogGroupProps{
		Retention: retention, EncryptionKey: b.dataKey, RemovalPolicy: awscdk.RemovalPolicy_DESTROY,
	})
}

// readyPort is where a host answers whether it is ready; the parent itself
// listens on loopback alone.
const readyPort = 9463

func (b *build) groups() {
	group := func(id, text string) awsec2.SecurityGroup {
		return awsec2.NewSecurityGroup(b.stack, str(id), &awsec2.SecurityGroupProps{Vpc: b.vpc, AllowAllOutbound: no, Description: str(text)})
	}
	b.endpoints = group("EndpointGroup", "interface endpoints")
	b.hosts = group("HostGroup", "parents of enclaves")
	b.health = group("HealthGroup", "load balancer that asks parents whether they are ready")
	https := awsec2.Port_Tcp(num(443))
	b.hosts.Connections().AllowTo(b.endpoints, https, str("AWS APIs"))
	// S3 and DynamoDB have public addresses, behind gateway endpoints. There is no
	// route to any other public address.
	b.hosts.AddEgressRule(awsec2.Peer_AnyIpv4(), https, str("S3 and DynamoDB by gateway endpoints"), no)
	b.health.Connections().AllowTo(b.hosts, awsec2.Port_Tcp(num(readyPort)), str("ready?"))
}

// ours is a condition on whose credentials a call is made with.
func (b *build) ours() map[string]any { return map[string]any{"aws:PrincipalAccount": b.t.Account} }

// anybody of this account, for policies of endpoints.
func (b *build) anybody(actions []string, resources ...*string) awsiam.PolicyStatement {
	return awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
		Principals: &[]awsiam.IPrincipal{awsiam.NewAnyPrincipal()}, Actions: strs(actions...), Resources: &resources,
		Conditions: &map[string]any{"StringEquals": b.ours()},
	})
}

func (b *build) gateways() {
	tables := b.vpc.AddGatewayEndpoint(str("DynamoDb"), &awsec2.GatewayVpcEndpointOptions{Service: awsec2.GatewayVpcEndpointAwsService_DYNAMODB()})
	tables.AddToPolicy(b.anybody([]string{"dynamodb:*"}, str(b.arn("dynamodb", "table/"+b.t.TablePrefix()+"*"))))
	files := b.vpc.AddGatewayEndpoint(str("S3"), &awsec2.GatewayVpcEndpointOptions{Service: awsec2.GatewayVpcEndpointAwsService_S3()})
	files.AddToPolicy(b.anybody([]string{"s3:GetObject", "s3:GetObjectVersion"},
		str("arn:"+b.t.Partition()+":s3:::"+b.assetBucket()+"/*")))
	// dnf reads the package repositories, which are public buckets, without
	// credentials, so there is no principal to ask for.
	files.AddToPolicy(awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
		Principals: &[]awsiam.IPrincipal{awsiam.NewAnyPrincipal()}, Actions: strs("s3:GetObject"),
		Resources: strs("arn:" + b.t.Partition() + ":s3:::al2023-repos-" + b.t.Region + "-*/*"),
	}))
}

// assetBucket is where cdk bootstrap keeps what is deployed.
func (b *build) assetBucket() string {
	return "cdk-" + target.BootstrapQualifier + "-assets-" + b.t.Account + "-" + b.t.Region
}

// interfaces makes an endpoint per API, each with a policy: credentials of other
// accounts get nothing through them, and KMS is there for the keyring's key alone: the other one is used by services.
//
// A slice and no map, here and wherever constructs are made: Go's maps have no
// order, and templates would differ from run to run.
func (b *build) interfaces() {
	zones := awsec2.SubnetSelection{SubnetType: awsec2.SubnetType_PRIVATE_ISOLATED}
	if b.t.Profile.Endpoints < len(b.t.Zones) {
		zones = awsec2.SubnetSelection{AvailabilityZones: strs(b.t.Zones[:b.t.Profile.Endpoints]...), SubnetType: awsec2.SubnetType_PRIVATE_ISOLATED}
	}
	for _, e := range []struct {
		id        string
		service   awsec2.InterfaceVpcEndpointAwsService
		actions   []string
		resources []*string
	}{
		{
			"Kms", awsec2.InterfaceVpcEndpointAwsService_KMS(),
			[]string{"kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey", "kms:GetKeyPolicy", "kms:ListGrants"},
			[]*string{b.keyring.AttrArn()},
		},
		{"Ssm", awsec2.InterfaceVpcEndpointAwsService_SSM(), []string{"ssm:*"}, []*string{str("*")}},
		{"SsmMessages", awsec2.InterfaceVpcEndpointAwsService_SSM_MESSAGES(), []string{"ssmmessages:*"}, []*string{str("*")}},
		{
			"Logs", awsec2.InterfaceVpcEndpointAwsService_CLOUDWATCH_LOGS(),
			[]string{"logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"},
			[]*string{str(b.arn("logs", "*"))},
		},
		{"Monitoring", awsec2.InterfaceVpcEndpointAwsService_CLOUDWATCH_MONITORING(), []string{"cloudwatch:PutMetricData"}, []*string{str("*")}},
		{
			"Sqs", awsec2.InterfaceVpcEndpointAwsService_SQS(),
			[]string{"sqs:GetQueueAttributes", "sqs:GetQueueUrl", "sqs:SendMessage"},
			[]*string{str(b.arn("sqs", b.t.Name()+"-ingest"))},
		},
	} {
		if e.id == "Sqs" && b.t.Profile.Name == "dev" {
			continue // for clients inside the network; dev has none
		}
		made := b.vpc.AddInterfaceEndpoint(str(e.id), &awsec2.InterfaceVpcEndpointOptions{
			Service: e.service, Open: no, PrivateDnsEnabled: yes, Subnets: &zones,
			SecurityGroups: &[]awsec2.ISecurityGroup{b.endpoints},
		})
		made.AddToPolicy(b.anybody(e.actions, e.resources...))
	}
}
