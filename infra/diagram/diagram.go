// Package diagram draws a synthesized template of package stack as a Mermaid
// flowchart. Nodes and edges are read from the template: who may do what from the
// policies, who tells whom from rules, queues and notifications. It draws nothing
// that is not in there.
package diagram

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

type template struct {
	Resources map[string]resource
}

type resource struct {
	Type       string
	Properties map[string]any
}

// chart is a flowchart in the making.
type chart struct {
	t     template
	lines []string
}

// Mermaid returns the flowchart of a template.
func Mermaid(raw []byte) (string, error) {
	var c chart
	if err := json.Unmarshal(raw, &c.t); err != nil {
		return "", fmt.Errorf("read the template: %w", err)
	}
	if len(c.of("AWS::AutoScaling::AutoScalingGroup")) != 1 {
		return "", errors.New("draw the template: it is no Keyhold stack")
	}
	c.add("flowchart LR")
	c.network()
	c.stores()
	c.add("  control[\"Lambda<br>start, stop, state, drain\"]", "  ingest[\"Lambda<br>import\"]")
	c.add(fmt.Sprintf("  alarms([\"%d alarms, SNS topic\"])", len(c.of("AWS::CloudWatch::Alarm"))))
	c.rights()
	c.release()
	c.messages()
	return strings.Join(c.lines, "\n") + "\n", nil
}

func (c *chart) add(lines ...string) { c.lines = append(c.lines, lines...) }

// of returns the ids of a type in order.
func (c *chart) of(kind string) []string {
	var out []string
	for _, id := range slices.Sorted(maps.Keys(c.t.Resources)) {
		if c.t.Resources[id].Type == kind {
			out = append(out, id)
		}
	}
	return out
}

// text of whatever a property is.
func text(v any) string {
	b, _ := json.Marshal(v) //nolint:errchkjson // it came from JSON
	return string(b)
}

var service = regexp.MustCompile(`com\.amazonaws\.[a-z0-9-]+\.([a-z0-9]+)|"\.([a-z0-9]+)"`)

func (c *chart) network() {
	group := c.t.Resources[c.of("AWS::AutoScaling::AutoScalingGroup")[0]].Properties
	data, _ := c.t.Resources[c.of("AWS::EC2::LaunchTemplate")[0]].Properties["LaunchTemplateData"].(map[string]any)
	kinds := map[string][]string{}
	for _, id := range c.of("AWS::EC2::VPCEndpoint") {
		p := c.t.Resources[id].Properties
		name := id
		if m := service.FindStringSubmatch(text(p["ServiceName"])); m != nil {
			name = m[1] + m[2]
		}
		kind, _ := p["VpcEndpointType"].(string)
		kinds[kind] = append(kinds[kind], name)
	}
	c.add(
		fmt.Sprintf("  subgraph vpc[\"VPC without a way to the internet, %d subnets\"]", len(c.of("AWS::EC2::Subnet"))),
		fmt.Sprintf("    subgraph hosts[\"Auto Scaling group, %v to %v of %v\"]", group["MinSize"], group["MaxSize"], data["InstanceType"]),
		"      enclave[[\"enclave<br>keys in the clear, here alone\"]]",
		"      parent[\"keyhold-parent\"]",
		"      parent <-->|vsock| enclave",
		"    end",
		"    nlb[\"internal load balancer\"] -->|/readyz| parent",
	)
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		c.add(fmt.Sprintf("    %s[\"%s endpoints<br>%s\"]", strings.ToLower(kind), strings.ToLower(kind), strings.Join(kinds[kind], ", ")))
	}
	c.add("  end")
}

// stores are tables, keys, buckets and queues.
func (c *chart) stores() {
	c.add(fmt.Sprintf("  subgraph dynamodb[\"DynamoDB, %d tables\"]", len(c.of("AWS::DynamoDB::Table"))))
	for _, name := range c.tables() {
		c.add(fmt.Sprintf("    %s[(%s)]", name, name))
	}
	c.add("  end", "  key{{\"KMS key of the keyring\"}}", "  archive[(\"archive bucket\")]")
}

// tables are their names without the prefix that all have.
func (c *chart) tables() []string {
	var names []string
	for _, id := range c.of("AWS::DynamoDB::Table") {
		name := c.t.Resources[id].Properties["TableName"].(string) //nolint:errcheck,forcetypeassert // stack gives every table a name
		names = append(names, name[strings.LastIndex(name, "-")+1:])
	}
	slices.Sort(names)
	return names
}

// rights draws which role may read and write which table.
func (c *chart) rights() {
	for _, who := range []struct{ node, policy string }{{"parent", "ParentTables"}, {"ingest", "IngestTables"}, {"control", "ControlTables"}} {
		reads, writes := map[string]bool{}, map[string]bool{}
		for _, id := range c.of("AWS::IAM::Policy") {
			if !strings.HasPrefix(id, who.policy) {
				continue
			}
			document, _ := c.t.Resources[id].Properties["PolicyDocument"].(map[string]any)
			for _, s := range list(document["Statement"]) {
				statement, _ := s.(map[string]any)
				c.mark(statement, reads, writes)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(reads)) {
			if writes[name] {
				c.add(fmt.Sprintf("  %s <-->|reads, writes| %s", who.node, name))
			} else {
				c.add(fmt.Sprintf("  %s -->|reads| %s", name, who.node))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(writes)) {
			if !reads[name] {
				c.add(fmt.Sprintf("  %s -->|writes| %s", who.node, name))
			}
		}
	}
}

// mark notes which tables a statement lets read and write. Describing is neither.
func (c *chart) mark(statement map[string]any, reads, writes map[string]bool) {
	actions := text(statement["Action"])
	for _, name := range c.tables() {
		for _, r := range list(statement["Resource"]) {
			if of, _ := r.(string); !strings.HasSuffix(of, "-"+name) && !strings.Contains(of, "-"+name+"/") {
				continue
			}
			for _, a := range []string{"GetItem", "Query", "Scan", "ConditionCheckItem"} {
				reads[name] = reads[name] || strings.Contains(actions, a)
			}
			for _, a := range []string{"PutItem", "UpdateItem", "DeleteItem"} {
				writes[name] = writes[name] || strings.Contains(actions, a)
			}
		}
	}
	maps.DeleteFunc(reads, func(_ string, is bool) bool { return !is })
	maps.DeleteFunc(writes, func(_ string, is bool) bool { return !is })
}

// release draws to whom the key's policy gives it.
func (c *chart) release() {
	for _, id := range c.of("AWS::KMS::Key") {
		policy, _ := c.t.Resources[id].Properties["KeyPolicy"].(map[string]any)
		pairs := 0
		for _, s := range list(policy["Statement"]) {
			if strings.Contains(text(s), `"Effect":"Allow"`) && strings.Contains(text(s), "RecipientAttestation:PCR16") {
				pairs++
			}
		}
		if pairs > 0 {
			c.add(fmt.Sprintf("  key -.->|\"to %d attested pair of image and config, by way of parent and endpoint\"| enclave", pairs))
		}
	}
}

// messages draws who tells whom.
func (c *chart) messages() {
	for _, id := range c.of("AWS::S3::Bucket") {
		if strings.Contains(text(c.t.Resources[id].Properties["NotificationConfiguration"]), "QueueConfigurations") {
			c.add("  archive -->|incoming/*.jsonl| queue[[\"SQS queue\"]]")
		}
	}
	for _, id := range c.of("AWS::SQS::Queue") {
		if redrive, ok := c.t.Resources[id].Properties["RedrivePolicy"].(map[string]any); ok {
			c.add(fmt.Sprintf("  queue -->|after %v receives| dead[[\"dead letters\"]]", redrive["maxReceiveCount"]))
		}
	}
	if len(c.of("AWS::Lambda::EventSourceMapping")) > 0 {
		c.add("  queue --> ingest")
	}
	for _, id := range c.of("AWS::Events::Rule") {
		p := c.t.Resources[id].Properties
		targets := text(p["Targets"])
		what, _ := p["Description"].(string)
		to := "control"
		if strings.Contains(targets, "Alarms") {
			to = "alarms"
		}
		name := "rule" + strings.ToLower(strings.TrimRight(id, "0123456789ABCDEF"))
		c.add(fmt.Sprintf("  %s>\"%s\"] --> %s", name, what, to))
	}
	c.add("  control -->|\"size; drain by an SSM document\"| hosts")
}

func list(v any) []any {
	if l, ok := v.([]any); ok {
		return l
	}
	return []any{v}
}
