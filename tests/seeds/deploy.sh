# SPDX-FileCopyrightText: Copyright (c) 2025 NVIDIA CORPORATION & AFFILIATES. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# What the multimodal example of ai-dynamo/dynamo has people type to deploy it, without its words. A line that is
# commented out is typed in the place of the one before of its kind.
export PROJECT_ROOT=$(pwd)
export KUBE_NS=dynamo-cloud
export DYNAMO_CLOUD=http://localhost:8080
# export DYNAMO_CLOUD=https://dynamo-cloud.nvidia.com
export DYNAMO_IMAGE=<your-registry>/<your-image-name>:<your-tag>
cd $PROJECT_ROOT/examples/multimodal
DYNAMO_TAG=$(dynamo build graphs.agg:Frontend | grep "Successfully built" |  awk '{ print $NF }' | sed 's/\.$//')
# DYNAMO_TAG=$(dynamo build graphs.disagg:Frontend | grep "Successfully built" |  awk '{ print $NF }' | sed 's/\.$//')
export DEPLOYMENT_NAME=multimodal-agg
dynamo deploy $DYNAMO_TAG -n $DEPLOYMENT_NAME -f ./configs/agg-llava.yaml
# dynamo deploy $DYNAMO_TAG -n $DEPLOYMENT_NAME -f ./configs/agg-qwen.yaml
# dynamo deploy $DYNAMO_TAG -n $DEPLOYMENT_NAME -f ./configs/agg-phi3v.yaml
# export DEPLOYMENT_NAME=multimodal-disagg
# dynamo deploy $DYNAMO_TAG -n $DEPLOYMENT_NAME -f ./configs/disagg.yaml
