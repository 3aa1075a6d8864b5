# SPDX-FileCopyrightText: Copyright (c) 2025 NVIDIA CORPORATION & AFFILIATES. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# What the multimodal example of ai-dynamo/dynamo has people type to reach a deployment, without its words.
export FRONTEND_POD=$(kubectl get pods -n ${KUBE_NS} | grep "${DEPLOYMENT_NAME}-frontend" | sort -k1 | tail -n1 | awk '{print $1}')
kubectl port-forward pod/$FRONTEND_POD 8000:8000 -n ${KUBE_NS}
