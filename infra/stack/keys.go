package stack

import (
	"encoding/json"
	"fmt"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awskms"
	"github.com/aws/jsii-runtime-go"
	"github.com/keyhold/keyhold/keypolicy"
)

// keys makes the role of the instances, the key that wraps the keyring's data key,
// and another one for everything that AWS services encrypt.
func (b *build) keys(policy keypolicy.Policy) {
	b.role = awsiam.NewRole(b.stack, str("ParentRole"), &awsiam.RoleProps{
		RoleName:    str(b.t.Name() + "-parent"), // fixed: the key policy names it
		AssumedBy:   awsiam.NewServicePrincipal(str("ec2.amazonaws.com"), nil),
		Description: str("Parent instances of Keyhold, and the enclaves on them. Never sees a key in plaintext."),
	})
	// A role that is made anew under its name is another one to KMS.
	b.role.ApplyRemovalPolicy(b.removal())
	b.keyringKey(policy)
	b.servicesKey()
}

// keyringKey uses the plain resource: with the one of a higher level any grant
// elsewhere in the stack could add statements of its own to the policy.
func (b *build) keyringKey(policy keypolicy.Policy) {
	var document map[string]any
	if err := json.Unmarshal(policy.JSON(), &document); err != nil {
		panic(fmt.Sprintf("keypolicy: not JSON: %v", err)) // it proved what it built by reading it back
	}
	props := &awskms.CfnKeyProps{
		Description: str("Wraps the data key of the keyring of " + b.t.Name() + ". Released to attested enclaves alone."),
		KeyPolicy:   document, EnableKeyRotation: true, PendingWindowInDays: num(b.t.Profile.KeyDays),
		KeySpec: str("SYMMETRIC_DEFAULT"), KeyUsage: str("ENCRYPT_DECRYPT"), MultiRegion: false, Origin: str("AWS_KMS"),
	}
	if b.t.Sealed {
		// KMS refuses a policy that its author could not change again, unless it is
		// told that this is meant.
		props.BypassPolicyLockoutSafetyCheck = true
	}
	b.keyring = awskms.NewCfnKey(b.stack, str("KeyringKey"), props)
	b.keyring.ApplyRemovalPolicy(b.removal(), nil)
	// KMS refuses a policy that names a role which is not there.
	b.keyring.Node().AddDependency(b.role)
	awskms.NewCfnAlias(b.stack, str("KeyringAlias"), &awskms.CfnAliasProps{
		AliasName: str("alias/" + b.t.Name() + "-keyring"), TargetKeyId: b.keyring.Ref(),
	})
}

// servicesKey can be used through services alone, by nobody directly; its
// administrators too use it only as everybody does who may read a table.
func (b *build) servicesKey() {
	statement := func(sid string, p awsiam.PolicyStatementProps) awsiam.PolicyStatement {
		p.Sid, p.Resources = str(sid), strs("*")
		return awsiam.NewPolicyStatement(&p)
	}
	services := func(names ...string) *[]awsiam.IPrincipal {
		var out []awsiam.IPrincipal
		for _, n := range names {
			out = append(out, awsiam.NewServicePrincipal(str(n), nil))
		}
		return &out
	}
	var admins []awsiam.IPrincipal
	for _, arn := range b.t.Admins {
		admins = append(admins, awsiam.NewArnPrincipal(str(arn)))
	}
	use := []string{"kms:Decrypt", "kms:DescribeKey", "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*"}
	var via []string
	for _, s := range []string{"dynamodb", "s3", "sns", "sqs"} {
		via = append(via, fmt.Sprintf("%s.%s.amazonaws.com", s, b.t.Region))
	}
	doc := awsiam.NewPolicyDocument(&awsiam.PolicyDocumentProps{Statements: &[]awsiam.PolicyStatement{
		statement("AdministerWithoutUse", awsiam.PolicyStatementProps{Principals: &admins, Actions: strs(
			"kms:CancelKeyDeletion", "kms:DescribeKey", "kms:DisableKey", "kms:DisableKeyRotation", "kms:EnableKey", "kms:EnableKeyRotation",
			"kms:GetKeyPolicy", "kms:GetKeyRotationStatus", "kms:ListGrants", "kms:ListResourceTags", "kms:PutKeyPolicy", "kms:RevokeGrant",
			"kms:ScheduleKeyDeletion", "kms:TagResource", "kms:UntagResource", "kms:UpdateKeyDescription",
		)}),
		// Whoever IAM lets use these services, and through them only: who may read a
		// table may have it decrypted.
		statement("UseThroughServices", awsiam.PolicyStatementProps{
			Principals: &[]awsiam.IPrincipal{awsiam.NewAnyPrincipal()}, Actions: strs(use...),
			Conditions: &map[string]any{"StringEquals": map[string]any{"kms:CallerAccount": b.t.Account, "kms:ViaService": via}},
		}),
		// DynamoDB keeps a grant for each table, made for whoever creates the table.
		statement("GrantsForTables", awsiam.PolicyStatementProps{
			Principals: &[]awsiam.IPrincipal{awsiam.NewAnyPrincipal()}, Actions: strs("kms:CreateGrant"),
			Conditions: &map[string]any{
				"StringEquals": map[string]any{"kms:CallerAccount": b.t.Account, "kms:ViaService": fmt.Sprintf("dynamodb.%s.amazonaws.com", b.t.Region)},
				"Bool":         map[string]any{"kms:GrantIsForAWSResource": "true"},
			},
		}),
		statement("LogGroups", awsiam.PolicyStatementProps{
			Principals: services(fmt.Sprintf("logs.%s.amazonaws.com", b.t.Region)), Actions: strs(use...),
			Conditions: &map[string]any{"ArnLike": map[string]any{"kms:EncryptionContext:aws:logs:arn": b.arn("logs", "log-group:*")}},
		}),
		// They send to the topic and, of files that were put into the bucket, to the queue.
		statement("AlarmsAndEvents", awsiam.PolicyStatementProps{
			Principals: services("cloudwatch.amazonaws.com", "events.amazonaws.com", "s3.amazonaws.com"), Actions: strs("kms:Decrypt", "kms:GenerateDataKey*"),
			Conditions: &map[string]any{"StringEquals": map[string]any{"aws:SourceAccount": b.t.Account}},
		}),
		statement("Trail", awsiam.PolicyStatementProps{
			Principals: services("cloudtrail.amazonaws.com"), Actions: strs("kms:DescribeKey", "kms:GenerateDataKey*"),
			Conditions: &map[string]any{"StringEquals": map[string]any{"aws:SourceArn": b.arn("cloudtrail", "trail/"+b.t.Name())}},
		}),
	}})
	b.dataKey = awskms.NewKey(b.stack, str("DataKey"), &awskms.KeyProps{
		Description: str("Encrypts tables, buckets, queues, topics and logs of " + b.t.Name()), EnableKeyRotation: yes,
		Policy: doc, RemovalPolicy: b.removal(), PendingWindow: awscdk.Duration_Days(jsii.Number(b.t.Profile.KeyDays)),
		Alias: str("alias/" + b.t.Name() + "-data"),
	})
}
