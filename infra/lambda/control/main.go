// Command control is the Lambda function that starts and stops a Keyhold fleet,
// drains instances before they end, and reports the backlog. It refuses every
// other action.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	c, err := connect(context.Background(), os.Getenv, log)
	if err != nil {
		log.Error("control does not start", slog.Any("error", err))
		os.Exit(1)
	}
	lambda.Start(function{c})
}

// function decodes events itself, so that calls can be followed from main.
type function struct{ c *Control }

// Invoke implements lambda.Handler.
func (f function) Invoke(ctx context.Context, payload []byte) ([]byte, error) {
	var e Event
	if err := json.Unmarshal(payload, &e); err != nil {
		return nil, errAction
	}
	s, err := f.c.Handle(ctx, e)
	if err != nil {
		f.c.Logger.ErrorContext(ctx, "event not handled", slog.Any("error", err))
		return nil, err
	}
	return json.Marshal(s)
}

// connect makes the function of its environment.
func connect(ctx context.Context, env func(string) string, log *slog.Logger) (*Control, error) {
	least, err := strconv.Atoi(env("KEYHOLD_INSTANCES"))
	if err != nil {
		return nil, errors.New("KEYHOLD_INSTANCES: want a number")
	}
	cfg, err := awsconfig.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	return &Control{
		Name: env("KEYHOLD_STACK"), Group: env("KEYHOLD_GROUP"), Least: least,
		Fleet: &group{client: autoscaling.NewFromConfig(cfg), name: env("KEYHOLD_GROUP")},
		Host:  &host{client: ssm.NewFromConfig(cfg), document: env("KEYHOLD_DRAIN")},
		Queue: dynamo.New(dynamodb.NewFromConfig(cfg), dynamo.Options{Prefix: env("KEYHOLD_TABLE_PREFIX")}),
		Now:   time.Now, Logger: log, Out: os.Stdout,
	}, nil
}

// group is a Fleet.
type group struct {
	client *autoscaling.Client
	name   string
}

func (g *group) Size(ctx context.Context, least, wanted int) error {
	_, err := g.client.UpdateAutoScalingGroup(ctx, &autoscaling.UpdateAutoScalingGroupInput{
		AutoScalingGroupName: &g.name, MinSize: aws.Int32(int32(least)), DesiredCapacity: aws.Int32(int32(wanted)), //nolint:gosec // G115: a handful of instances
	})
	return err
}

func (g *group) Count(ctx context.Context) (inService, wanted int, err error) {
	out, err := g.client.DescribeAutoScalingGroups(ctx, &autoscaling.DescribeAutoScalingGroupsInput{AutoScalingGroupNames: []string{g.name}})
	if err != nil {
		return 0, 0, err
	}
	if len(out.AutoScalingGroups) != 1 {
		return 0, 0, errors.New("there is no such group")
	}
	for _, i := range out.AutoScalingGroups[0].Instances {
		if i.LifecycleState == "InService" {
			inService++
		}
	}
	return inService, int(aws.ToInt32(out.AutoScalingGroups[0].DesiredCapacity)), nil
}

func (g *group) Proceed(ctx context.Context, e Event) error {
	_, err := g.client.CompleteLifecycleAction(ctx, &autoscaling.CompleteLifecycleActionInput{
		AutoScalingGroupName: &g.name, LifecycleHookName: &e.Detail.Hook, LifecycleActionToken: &e.Detail.Token,
		InstanceId: &e.Detail.Instance, LifecycleActionResult: aws.String("CONTINUE"),
	})
	return err
}

// host is a Host.
type host struct {
	client   *ssm.Client
	document string
}

// drainWithin is longer than a lease and the stop of the units; the function's own
// time-out is longer.
const drainWithin = 100 * time.Second

const drainPoll = 2 * time.Second

func (h *host) Drain(ctx context.Context, instance string) error {
	ctx, cancel := context.WithTimeout(ctx, drainWithin)
	defer cancel()
	sent, err := h.client.SendCommand(ctx, &ssm.SendCommandInput{DocumentName: &h.document, InstanceIds: []string{instance}})
	if err != nil {
		return fmt.Errorf("send the command: %w", err)
	}
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the command: %w", context.Cause(ctx))
		}
		out, err := h.client.GetCommandInvocation(ctx, &ssm.GetCommandInvocationInput{CommandId: sent.Command.CommandId, InstanceId: &instance})
		var unknown *types.InvocationDoesNotExist
		switch {
		case errors.As(err, &unknown): // not there yet
			continue
		case err != nil:
			return fmt.Errorf("ask for the command: %w", err)
		}
		switch out.Status {
		case types.CommandInvocationStatusSuccess:
			return nil
		case types.CommandInvocationStatusPending, types.CommandInvocationStatusInProgress, types.CommandInvocationStatusDelayed:
		case types.CommandInvocationStatusCancelled, types.CommandInvocationStatusTimedOut, types.CommandInvocationStatusFailed,
			types.CommandInvocationStatusCancelling:
			return fmt.Errorf("the command ended as %s", out.Status)
		default:
			return errors.New("the command ended in a way that is not known")
		}
	}
}
