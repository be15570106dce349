package stack_test

import (
	"encoding/csv"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/jsii-runtime-go"
	"github.com/cdklabs/cdk-nag-go/cdknag/v2"

	"github.com/keyhold/keyhold/infra/stack"
	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

func needCheck(t *testing.T) {
	t.Helper()
	if !checkAll {
		t.Skip("set KEYHOLD_INFRA_CHECK=1, or run make infra-check: validation and cdk-nag take some seconds a template")
	}
	needNode(t)
}

// Columns of cdk-nag's report.
const (
	columnRule = iota
	columnWhere
	columnResult
	columnReason
)

func nag(t *testing.T, m template) [][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(m.folder, "AwsSolutions-*-NagReport.csv"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%d reports, %v", len(files), err)
	}
	f, err := os.Open(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil || len(rows) < 2 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	return rows[1:]
}

func TestNagFindsNothingThatIsNotAcknowledgedWithAReason(t *testing.T) {
	needCheck(t)
	for _, v := range variants {
		compliant, acknowledged := 0, 0
		for _, row := range nag(t, running(t, v)) {
			switch row[columnResult] {
			case "Compliant", "N/A":
				compliant++
			case "Suppressed":
				acknowledged++
				if len(strings.Fields(row[columnReason])) < 8 {
					t.Errorf("%s: %s at %s is acknowledged without a reason: %q", v, row[columnRule], row[columnWhere], row[columnReason])
				}
			default:
				t.Errorf("%s: %s at %s: %s", v, row[columnRule], row[columnWhere], strings.Join(row[columnResult:], ", "))
			}
		}
		// One that is acknowledged and no longer found would hide the next of its kind.
		if want := 7; acknowledged != want {
			t.Errorf("%s: %d findings are acknowledged, want %d", v, acknowledged, want)
		}
		t.Logf("%s: %d compliant, %d acknowledged", v, compliant, acknowledged)
	}
}

// The tests of validation would pass as well if it did not run.
func TestAnErrorOfCloudFormationsRulesEndsTheSynthesis(t *testing.T) {
	needCheck(t)
	d := targettest.Read(t, targettest.Values("dev", target.AMD64, targettest.Release(t, "one", target.AMD64)))
	err := sabotaged(t, d, func(s awscdk.Stack) {
		queue := s.Node().FindChild(jsii.String("Ingest")).Node().DefaultChild().(awscdk.CfnResource)
		queue.AddPropertyOverride(jsii.String("VisibilityTimeout"), 999_999)
	})
	if err == nil || !strings.Contains(err.Error(), "Validation failed") {
		t.Errorf("a time-out of days: %v", err)
	}
}

func TestNagFindsAWildcardBesideOneThatIsAcknowledged(t *testing.T) {
	needCheck(t)
	d := targettest.Read(t, targettest.Values("dev", target.AMD64, targettest.Release(t, "one", target.AMD64)))
	var folder string
	err := sabotaged(t, d, func(s awscdk.Stack) {
		policy := s.Node().FindChild(jsii.String("IngestFiles")).(awsiam.Policy)
		policy.AddStatements(awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
			Actions: jsii.Strings("s3:GetObject"), Resources: jsii.Strings("arn:aws:s3:::everything/*"),
		}))
		folder = *awscdk.Stage_Of(s).Outdir()
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range nag(t, template{folder: folder}) {
		if row[columnResult] == "Non-Compliant" && strings.Contains(row[columnWhere], "IngestFiles") {
			return
		}
	}
	t.Error("it was not found")
}

// sabotaged synthesizes a stack after something was done to it.
func sabotaged(t *testing.T, d *target.Target, do func(awscdk.Stack)) (err error) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			err = asError(r)
		}
	}()
	app := awscdk.NewApp(&awscdk.AppProps{AnalyticsReporting: jsii.Bool(false), Outdir: jsii.String(t.TempDir()), Context: flags(t)})
	s, err := stack.New(app, d)
	if err != nil {
		return err
	}
	awscdk.Aspects_Of(app).Add(cdknag.NewAwsSolutionsChecks(nil), nil)
	do(s)
	app.Synth(nil)
	return nil
}
